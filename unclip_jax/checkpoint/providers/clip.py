"""CLIP of transformers (`CLIPModel`, or its text or vision half with projection), and of OpenAI's own files.

transformers: a folder with `config.json`. OpenAI: a folder with `model.safetensors` alone, whose tensors have
  OpenAI's names;
the shapes of the tensors say what the network is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part, no_part
from unclip_jax.checkpoint.convert import Rule, convert, expect, linear, norm, shapes_of
from unclip_jax.checkpoint.files import Place, missing_settings, open_weights, read_json
from unclip_jax.data.tokenizer import VOCAB_SIZE, ClipTokenizer
from unclip_jax.errors import InputError
from unclip_jax.models.clip import CLIP

HALVES = ("clip_text_model", "clip_vision_model")


# ------------------------------------------------------------------------------------------- names


def _block(theirs: str, ours: str) -> list[Rule]:
    # A block by the names of transformers; \1 is its number.
    at, to = rf"{theirs}layers\.(\d+)\.", rf"{ours}/transformer/block_\1"
    return [
        *(
            rule
            for name in ("query", "key", "value")
            for rule in linear(rf"{at}self_attn\.{name[0]}_proj", f"{to}/attn/{name}", "heads")
        ),
        *linear(rf"{at}self_attn\.out_proj", f"{to}/attn/out", "merge"),
        *norm(rf"{at}layer_norm([12])", rf"{to}/ln\2/norm"),
        *linear(rf"{at}mlp\.fc([12])", rf"{to}/fc\2"),
    ]


# transformers from 5.6 on writes the halves without "text_model." and "vision_model.". Older files hold the
# buffer `position_ids`.
TEXT: tuple[Rule, ...] = (
    Rule(r"(?:text_model\.)?embeddings\.position_ids", ()),
    Rule(r"(?:text_model\.)?embeddings\.(token|position)_embedding\.weight", r"text_tower/\1_embedding"),
    *norm(r"(?:text_model\.)?final_layer_norm", "text_tower/ln_final/norm"),
    Rule(r"text_projection\.weight", "text_tower/projection/kernel", "linear"),
    *_block(r"(?:text_model\.)?encoder\.", "text_tower"),
)
IMAGE: tuple[Rule, ...] = (
    Rule(r"(?:vision_model\.)?embeddings\.position_ids", ()),
    Rule(r"(?:vision_model\.)?embeddings\.class_embedding", "image_tower/class_embedding"),
    Rule(r"(?:vision_model\.)?embeddings\.position_embedding\.weight", "image_tower/position_embedding"),
    Rule(r"(?:vision_model\.)?embeddings\.patch_embedding\.weight", "image_tower/patch_embed/kernel", "conv"),
    *norm(r"(?:vision_model\.)?pre_layrnorm", "image_tower/ln_pre/norm"),
    *norm(r"(?:vision_model\.)?post_layernorm", "image_tower/ln_post/norm"),
    Rule(r"visual_projection\.weight", "image_tower/projection/kernel", "linear"),
    *_block(r"(?:vision_model\.)?encoder\.", "image_tower"),
)
# In the whole model the prefix tells the halves' names apart.
BOTH: tuple[Rule, ...] = (
    Rule("logit_scale", "logit_scale"),
    *(Rule(r.pattern.replace(r"(?:text_model\.)?", r"text_model\."), r.target, r.transform) for r in TEXT),
    *(
        Rule(r.pattern.replace(r"(?:vision_model\.)?", r"vision_model\."), r.target, r.transform)
        for r in IMAGE
    ),
)


def _openai_block(theirs: str, ours: str) -> list[Rule]:
    at, to = rf"{theirs}transformer\.resblocks\.(\d+)\.", rf"{ours}/transformer/block_\1"
    layers = [f"{to}/attn/{name}" for name in ("query", "key", "value")]  # one tensor holds all three
    return [
        Rule(rf"{at}attn\.in_proj_weight", tuple(f"{layer}/kernel" for layer in layers), "heads"),
        Rule(rf"{at}attn\.in_proj_bias", tuple(f"{layer}/bias" for layer in layers), "head_bias"),
        *linear(rf"{at}attn\.out_proj", f"{to}/attn/out", "merge"),
        *norm(rf"{at}ln_([12])", rf"{to}/ln\2/norm"),
        *linear(rf"{at}mlp\.c_fc", f"{to}/fc1"),
        *linear(rf"{at}mlp\.c_proj", f"{to}/fc2"),
    ]


OPENAI: tuple[Rule, ...] = (
    Rule("input_resolution|context_length|vocab_size|attn_mask", ()),
    Rule("logit_scale", "logit_scale"),
    Rule(r"token_embedding\.weight", "text_tower/token_embedding"),
    Rule("positional_embedding", "text_tower/position_embedding"),
    *norm("ln_final", "text_tower/ln_final/norm"),
    Rule("text_projection", "text_tower/projection/kernel"),
    Rule(r"visual\.class_embedding", "image_tower/class_embedding"),
    Rule(r"visual\.positional_embedding", "image_tower/position_embedding"),
    Rule(r"visual\.conv1\.weight", "image_tower/patch_embed/kernel", "conv"),
    *norm(r"visual\.ln_(pre|post)", r"image_tower/ln_\1/norm"),
    Rule(r"visual\.proj", "image_tower/projection/kernel"),
    *_openai_block(r"visual\.", "image_tower"),
    *_openai_block("", "text_tower"),
)


# ------------------------------------------------------------------------------------------- configurations
# The defaults of transformers; its files may leave them out.
TEXT_DEFAULTS = {
    **{
        "hidden_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "hidden_act": "quick_gelu",
    },
    **{"vocab_size": 49408, "max_position_embeddings": 77, "layer_norm_eps": 1e-5},
}
IMAGE_DEFAULTS = {
    **{
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "quick_gelu",
    },
    **{"image_size": 224, "patch_size": 32, "num_channels": 3, "layer_norm_eps": 1e-5},
}


def _tower(config: Mapping[str, Any]) -> dict:
    return {
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
    }


def text_config(config: Mapping[str, Any]) -> dict:
    """`CLIPTextConfig` -> keyword arguments of `TextTower`.

    Raises:
      ValueError: when the tower differs from ours.
    """
    config = TEXT_DEFAULTS | dict(config)
    expect(config, {"layer_norm_eps": 1e-5}, "the text tower")
    return _tower(config) | {"vocab_size": config["vocab_size"], "length": config["max_position_embeddings"]}


def image_config(config: Mapping[str, Any]) -> dict:
    """`CLIPVisionConfig` -> keyword arguments of `ImageTower`.

    Raises:
      ValueError: when the tower differs from ours.
    """
    config = IMAGE_DEFAULTS | dict(config)
    expect(config, {"layer_norm_eps": 1e-5, "num_channels": 3}, "the image tower")
    return _tower(config) | {"image_size": config["image_size"], "patch_size": config["patch_size"]}


def transformers_config(
    text: Mapping[str, Any] | None, image: Mapping[str, Any] | None, embed_dim: int
) -> dict:
    """Keyword arguments of `CLIP` from the configurations of its halves; None stands for a half that is not
    there.

    Raises:
      ValueError: when a half differs from ours, or the two have different activations.
    """
    pairs = ((TEXT_DEFAULTS, text), (IMAGE_DEFAULTS, image))
    used = {(defaults | dict(half))["hidden_act"] for defaults, half in pairs if half is not None}
    if len(used) != 1 or not used <= {"quick_gelu", "gelu"}:
        raise InputError(
            f"CLIP's towers have the activations {', '.join(sorted(map(str, used)))}; "
            "one of quick_gelu, gelu is known here"
        )
    return {
        "embed_dim": embed_dim,
        "text": None if text is None else text_config(text),
        "image": None if image is None else image_config(image),
        "activation": used.pop(),
    }


def two_halves(text: Mapping | None, image: Mapping | None) -> dict:
    """Keyword arguments of `CLIP` from the configurations of halves in folders of their own.

    Raises:
      ValueError: as `transformers_config`; or when the halves make embeddings of different sizes.
    """
    dims = {config.get("projection_dim", 512) for config in (text, image) if config is not None}
    if len(dims) != 1:
        sizes = " and ".join(map(str, sorted(dims)))
        raise InputError(f"the encoders make embeddings of {sizes}: they are of different CLIPs")
    return transformers_config(text, image, dims.pop())


def openai_config(shape: Callable[[str], tuple[int, ...]], names: Iterable[str]) -> dict:
    """Keyword arguments of `CLIP`, read from the shapes of OpenAI's tensors. Attention heads have 64
    channels.

    Raises:
      KeyError: when a tensor is missing.
    """

    def tower(prefix: str, width: int) -> dict:
        blocks = re.compile(rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\.")
        hidden = shape(f"{prefix}transformer.resblocks.0.mlp.c_fc.weight")[0]
        layers = len({match.group(1) for name in names if (match := blocks.match(name))})
        return {"width": width, "layers": layers, "heads": width // 64, "mlp_ratio": hidden / width}

    width, _, patch, _ = shape("visual.conv1.weight")
    side = math.isqrt(shape("visual.positional_embedding")[0] - 1)
    vocab_size, text_width = shape("token_embedding.weight")
    image = tower("visual.", width) | {"image_size": side * patch, "patch_size": patch}
    text = tower("", text_width) | {"vocab_size": vocab_size, "length": shape("positional_embedding")[0]}
    return {
        "embed_dim": shape("text_projection")[1],
        "text": text,
        "image": image,
        "activation": "quick_gelu",
    }


# ------------------------------------------------------------------------------------------- reading
def recognises(path: Path) -> bool:
    """Whether a folder holds CLIP in one of the two layouts."""
    if (path / "model_index.json").is_file():
        return False
    if (path / "config.json").is_file():
        return read_json(path / "config.json").get("model_type") in ("clip", *HALVES)
    if not (path / "model.safetensors").is_file() or (path / "bundle.json").is_file():
        return False
    return "visual.conv1.weight" in open_weights(path)


def read(path: Path, only: str | None, place: Place) -> Bundle:
    """Reads a folder with CLIP as a bundle of the one part `clip`; see `providers.Provider`."""
    if only not in (None, "clip"):
        raise no_part(path, only, ["clip"])
    with missing_settings(path):
        model, params = (
            _transformers(path, place) if (path / "config.json").is_file() else _openai(path, place)
        )
        tokenizer = _tokenizer(path, model["text"])
    config = {"kind": "clip", "model": model} | ({"tokenizer": tokenizer} if tokenizer else {})
    return Bundle({"clip": Part(config, params)}, provenance={"source": str(path)}, path=str(path))


def read_halves(model: dict, folders: Mapping[str, Path], place: Place) -> dict:
    """The parameters of a CLIP whose halves lie in folders of their own.

    Args:
      model: keyword arguments of `CLIP`.
      folders: by half: "text", "image".
      place: where each parameter goes.
    """
    halves, params = {"text": TEXT, "image": IMAGE}, {}
    for half, rules in halves.items():
        if model[half] is not None:
            shapes = _shapes(model | dict.fromkeys(halves) | {half: model[half]})
            params |= convert(open_weights(folders[half]), rules, shapes, f"CLIP's {half} encoder", place)
    if model["text"] is not None and model["image"] is not None:
        # The folders of halves do not hold the temperature. This is the limit to which training clamps it.
        params["logit_scale"] = place("logit_scale", np.float32(np.log(100.0)))
    return params


def _shapes(model: dict) -> Any:
    module, shapes = CLIP(**model), {}
    image, text = model["image"], model["text"]
    images = image and jnp.zeros((1, image["image_size"], image["image_size"], 3))
    tokens = text and jnp.zeros((1, text["length"]), jnp.int32)
    if image is not None and text is not None:
        return shapes_of(module.init, images, tokens)
    if image is not None:
        shapes |= shapes_of(module.init, images, method="encode_image")
    if text is not None:
        shapes |= shapes_of(module.init, tokens, method="encode_text")
    return shapes


def _transformers(path: Path, place: Place) -> tuple[dict, dict]:
    config = read_json(path / "config.json")
    if config["model_type"] in HALVES:
        is_text = config["model_type"] == "clip_text_model"
        model = two_halves(config if is_text else None, None if is_text else config)
        return model, read_halves(model, {"text": path, "image": path}, place)
    halves = ("text", "vision")
    text, image = (
        {**config.get(f"{h}_config", {}), **(config.get(f"{h}_config_dict") or {})} for h in halves
    )
    model = transformers_config(text, image, config.get("projection_dim", 512))
    return model, convert(open_weights(path), BOTH, _shapes(model), "CLIP", place)


def _openai(path: Path, place: Place) -> tuple[dict, dict]:
    weights = open_weights(path)
    try:
        model = openai_config(weights.shape, list(weights))
    except KeyError as error:
        raise InputError(f"CLIP does not fit these weights: {error.args[0]} is missing") from None
    return model, convert(weights, OPENAI, _shapes(model), "CLIP", place)


def _tokenizer(path: Path, text: Mapping | None) -> dict:
    # The folder's own, or the shipped one where the number of tokens is CLIP's; {} without a text encoder.
    if text is None:
        return {}
    if any((path / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        return ClipTokenizer.from_folder(path, text["length"]).config()
    if text["vocab_size"] != VOCAB_SIZE:
        raise InputError(
            f"{path} has no tokenizer, and its {text['vocab_size']} tokens are not CLIP's {VOCAB_SIZE}"
        )
    return ClipTokenizer(text["length"]).config()
