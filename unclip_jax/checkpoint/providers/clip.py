"""CLIP of transformers (`CLIPModel`, or its text or vision half with projection), and of OpenAI's own files.

transformers: a folder with `config.json`, and `preprocessor_config.json` for the images' statistics. OpenAI:
a folder with `model.safetensors`, whose tensors have OpenAI's names. The shapes of the tensors say which of
OpenAI's networks it is; any other network under these names needs the configuration that `open_clip` reads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part, no_part
from unclip_jax.checkpoint.check import clip_shapes
from unclip_jax.checkpoint.convert import Rule, convert, linear, norm
from unclip_jax.checkpoint.files import Place, open_weights, read_json
from unclip_jax.checkpoint.providers import preprocess
from unclip_jax.checkpoint.settings import Settings
from unclip_jax.data.tokenizer import VOCAB_SIZE, ClipTokenizer
from unclip_jax.errors import InputError
from unclip_jax.typed import check_value

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
# What any configuration of transformers may hold, and what does not change a CLIP that is applied.
_GENERAL = (
    *("architectures", "transformers_version", "torch_dtype", "dtype", "id2label", "label2id"),
    *("initializer_range", "initializer_factor", "logit_scale_init_value", "attention_dropout", "dropout"),
    *("bos_token_id", "pad_token_id", "sep_token_id", "use_cache", "gradient_checkpointing", "return_dict"),
    *("output_attentions", "output_hidden_states", "tie_word_embeddings", "chunk_size_feed_forward", "top_k"),
    *("diversity_penalty", "length_penalty", "max_length", "min_length", "num_beam_groups", "num_beams"),
    *("num_return_sequences", "repetition_penalty", "temperature", "top_p", "typical_p", "early_stopping"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "problem_type", "is_encoder_decoder"),
    "transformers.js_config",
)
_SAME = {"layer_norm_eps": (1e-5,), "is_decoder": (False,)}
_SHARED = {"hidden_act": (str, "quick_gelu"), "projection_dim": (int, 512)}
TEXT_SETTINGS = Settings(
    read={
        "hidden_size": (int, 512),
        "num_hidden_layers": (int, 12),
        "num_attention_heads": (int, 8),
        "intermediate_size": (int, 2048),
        "vocab_size": (int, 49408),
        "max_position_embeddings": (int, 77),
        "eos_token_id": (int, 49407),
        **_SHARED,
    },
    same=_SAME | {"model_type": (HALVES[0],)},
    free=_GENERAL,
)
IMAGE_SETTINGS = Settings(
    read={
        "hidden_size": (int, 768),
        "num_hidden_layers": (int, 12),
        "num_attention_heads": (int, 12),
        "intermediate_size": (int, 3072),
        "image_size": (int, 224),
        "patch_size": (int, 32),
        **_SHARED,
    },
    same=_SAME | {"num_channels": (3,), "model_type": (HALVES[1],)},
    free=(*_GENERAL, "eos_token_id"),
)
WHOLE_SETTINGS = Settings(
    read={"projection_dim": (int, 512), "model_type": (str, "clip")},
    free=(*_GENERAL, "text_config", "vision_config", "text_config_dict", "vision_config_dict"),
)


def _tower(config: Mapping[str, Any], name: str) -> dict:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % heads:
        raise InputError(f"{name}: its width {width} is no multiple of its {heads} heads")
    ratio = config["intermediate_size"] / width
    return {"width": width, "layers": config["num_hidden_layers"], "heads": heads, "mlp_ratio": ratio}


def text_config(config: Mapping[str, Any]) -> dict:
    """`CLIPTextConfig` -> keyword arguments of `TextTower`.

    Raises:
      ValueError: when the tower differs from ours.
    """
    config = TEXT_SETTINGS.take(config, "the text tower")
    # Older files say 2 for "the highest id".
    if config["eos_token_id"] not in (2, config["vocab_size"] - 1):
        raise InputError(
            f"the text tower: eos_token_id is {config['eos_token_id']}, but the network here reads the "
            f"caption at the highest id, {config['vocab_size'] - 1}"
        )
    sizes = {"vocab_size": config["vocab_size"], "length": config["max_position_embeddings"]}
    return _tower(config, "the text tower") | sizes


def image_config(config: Mapping[str, Any]) -> dict:
    """`CLIPVisionConfig` -> keyword arguments of `ImageTower`.

    Raises:
      ValueError: when the tower differs from ours.
    """
    config = IMAGE_SETTINGS.take(config, "the image tower")
    sizes = {"image_size": config["image_size"], "patch_size": config["patch_size"]}
    return _tower(config, "the image tower") | sizes


def transformers_config(
    text: Mapping[str, Any] | None, image: Mapping[str, Any] | None, embed_dim: int
) -> dict:
    """Keyword arguments of `CLIP` from the configurations of its halves; None stands for a half that is not
    there.

    Raises:
      ValueError: when a half differs from ours, or the two have different activations.
    """
    pairs = ((TEXT_SETTINGS, text, "the text tower"), (IMAGE_SETTINGS, image, "the image tower"))
    used = {known.take(half, name)["hidden_act"] for known, half, name in pairs if half is not None}
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
    pairs = ((TEXT_SETTINGS, text, "the text tower"), (IMAGE_SETTINGS, image, "the image tower"))
    dims = {known.take(half, name)["projection_dim"] for known, half, name in pairs if half is not None}
    if len(dims) != 1:
        sizes = " and ".join(map(str, sorted(dims)))
        raise InputError(f"the encoders make embeddings of {sizes}: they are of different CLIPs")
    return transformers_config(text, image, dims.pop())


# (embedding, width of the image tower, width of the text tower) of OpenAI's transformers: ViT-B, ViT-L. All
# have heads of 64 channels and QuickGELU.
OPENAI_SIZES = ((512, 768, 512), (768, 1024, 768))
# OpenAI's files hold these numbers beside the weights; files that open_clip wrote do not.
OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")


def openai_config(shape: Callable[[str], tuple[int, ...]], names: Iterable[str]) -> dict:
    """Keyword arguments of `CLIP` for OpenAI's own weights, read from the shapes of the tensors.

    The shapes tell neither heads nor activation, so the tensors must be those of a network that OpenAI
    published.

    Raises:
      KeyError: when a tensor is missing.
      ValueError: when the network is not one of OpenAI's.
    """
    names = list(names)

    def tower(prefix: str, width: int) -> dict:
        blocks = re.compile(rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\.")
        hidden = shape(f"{prefix}transformer.resblocks.0.mlp.c_fc.weight")[0]
        layers = len({match.group(1) for name in names if (match := blocks.match(name))})
        return {"width": width, "layers": layers, "heads": width // 64, "mlp_ratio": hidden / width}

    patches, positions = shape("visual.conv1.weight"), shape("visual.positional_embedding")
    tokens, projection = shape("token_embedding.weight"), shape("text_projection")
    if [len(s) for s in (patches, positions, tokens, projection)] != [4, 2, 2, 2]:
        raise InputError("CLIP does not fit these weights: a tensor has another number of axes")
    (width, _, patch, _), (vocab_size, text_width), embed_dim = patches, tokens, projection[1]
    sizes, numbers = (embed_dim, width, text_width), [name for name in OPENAI_NUMBERS if name in names]
    if sizes not in OPENAI_SIZES or not numbers:
        found = (
            f"an embedding of {embed_dim} and towers of {width} and {text_width}"
            if sizes not in OPENAI_SIZES
            else f"no {', '.join(OPENAI_NUMBERS)}, as open_clip's files"
        )
        raise InputError(
            f"these weights have {found}: they are not OpenAI's own, and their heads and activation cannot "
            "be told from the tensors; copy open_clip_config.json beside them"
        )
    side = math.isqrt(max(0, positions[0] - 1))
    image = tower("visual.", width) | {"image_size": side * patch, "patch_size": patch}
    text = tower("", text_width) | {"vocab_size": vocab_size, "length": shape("positional_embedding")[0]}
    return {"embed_dim": embed_dim, "text": text, "image": image, "activation": "quick_gelu"}


# ------------------------------------------------------------------------------------------- reading
def recognises(path: Path) -> bool:
    """Whether a folder holds CLIP in one of the two layouts."""
    if (path / "model_index.json").is_file():
        return False
    weights = any(path.glob("model*.safetensors*"))
    of_open_clip = (path / "open_clip_config.json").is_file()
    if (path / "config.json").is_file() and (weights or not of_open_clip):
        return read_json(path / "config.json").get("model_type") in ("clip", *HALVES)
    if of_open_clip or not weights or (path / "bundle.json").is_file():
        return False
    return "visual.conv1.weight" in open_weights(path)


def read(path: Path, only: str | None, place: Place) -> Bundle:
    """Reads a folder with CLIP as a bundle of the one part `clip`; see `providers.Provider`."""
    if only not in (None, "clip"):
        raise no_part(path, only, ["clip"])
    if (path / "adapter_config.json").is_file():
        raise InputError(f"{path} holds an adapter (adapter_config.json): merge it into the weights first")
    read_folder = _transformers if (path / "config.json").is_file() else _openai
    return as_bundle(path, *read_folder(path, place))


def as_bundle(path: Path, model: dict, params: dict) -> Bundle:
    """A folder's CLIP as a bundle of the one part `clip`.

    Args:
      path: the folder; its tokenizer is read from there.
      model: keyword arguments of `CLIP`.
      params: its parameters.
    """
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
            shapes = clip_shapes(model | dict.fromkeys(halves) | {half: model[half]})
            params |= convert(open_weights(folders[half]), rules, shapes, f"CLIP's {half} encoder", place)
    if model["text"] is not None and model["image"] is not None:
        # The folders of halves do not hold the temperature. This is the limit to which training clamps it.
        params["logit_scale"] = place("logit_scale", np.float32(np.log(100.0)))
    return params


def _transformers(path: Path, place: Place) -> tuple[dict, dict]:
    config = read_json(path / "config.json")
    if config["model_type"] in HALVES:
        is_text = config["model_type"] == "clip_text_model"
        model = two_halves(config if is_text else None, None if is_text else config)
    else:
        whole = WHOLE_SETTINGS.take(config, f"{path}/config.json")
        text, image = (
            {**_object(config, f"{half}_config"), **_object(config, f"{half}_config_dict")}
            for half in ("text", "vision")
        )
        model = transformers_config(text, image, whole["projection_dim"])
    if model["image"] is not None:
        model["image"] |= preprocess.of_transformers(path, model["image"]["image_size"])
    if config["model_type"] in HALVES:
        return model, read_halves(model, {"text": path, "image": path}, place)
    return model, convert(open_weights(path), BOTH, clip_shapes(model), "CLIP", place)


def _object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    check_value(config.get(key), dict | None, key)
    return config.get(key) or {}


def _openai(path: Path, place: Place) -> tuple[dict, dict]:
    weights = open_weights(path)
    try:
        model = openai_config(weights.shape, list(weights))
    except KeyError as error:
        raise InputError(f"CLIP does not fit these weights: {error.args[0]} is missing") from None
    model["image"] |= preprocess.of_transformers(path, model["image"]["image_size"])
    return model, convert(weights, OPENAI, clip_shapes(model), "CLIP", place)


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
