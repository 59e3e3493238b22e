"""CLIP of transformers (`CLIPModel`, its text or vision half with projection) and of OpenAI's own files."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from unclip_jax.checkpoint.convert import Rule, expect, linear, norm


def _block(theirs: str, ours: str) -> list[Rule]:
    # A pre-norm block of transformers' names; \1 is its number.
    at, to = rf"{theirs}layers\.(\d+)\.", rf"{ours}/transformer/block_\1"
    return [
        *(rule for name in ("query", "key", "value") for rule in linear(rf"{at}self_attn\.{name[0]}_proj", f"{to}/attn/{name}", "heads")),
        *linear(rf"{at}self_attn\.out_proj", f"{to}/attn/out", "merge"),
        *norm(rf"{at}layer_norm([12])", rf"{to}/ln\2/norm"),
        *linear(rf"{at}mlp\.fc([12])", rf"{to}/fc\2"),
    ]


# transformers from 5.6 on writes the halves without "text_model." and "vision_model."; older files hold the buffer `position_ids`.
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
# In the whole model the halves' names must be told apart.
BOTH: tuple[Rule, ...] = (
    Rule("logit_scale", "logit_scale"),
    *(Rule(r.pattern.replace(r"(?:text_model\.)?", r"text_model\."), r.target, r.transform) for r in TEXT),
    *(Rule(r.pattern.replace(r"(?:vision_model\.)?", r"vision_model\."), r.target, r.transform) for r in IMAGE),
)


def _openai_block(theirs: str, ours: str) -> list[Rule]:
    at, to = rf"{theirs}transformer\.resblocks\.(\d+)\.", rf"{ours}/transformer/block_\1"
    three = lambda leaf: tuple(f"{to}/attn/{name}/{leaf}" for name in ("query", "key", "value"))  # noqa: E731
    return [
        Rule(rf"{at}attn\.in_proj_weight", three("kernel"), "heads"),
        Rule(rf"{at}attn\.in_proj_bias", three("bias"), "head_bias"),
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


# The defaults of transformers, which its files may leave out.
TEXT_DEFAULTS = {
    **{"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048, "hidden_act": "quick_gelu"},
    **{"vocab_size": 49408, "max_position_embeddings": 77, "layer_norm_eps": 1e-5},
}
IMAGE_DEFAULTS = {
    **{"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "quick_gelu"},
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
      ValueError: when the tower has what ours has not.
    """
    config = TEXT_DEFAULTS | dict(config)
    expect(config, {"layer_norm_eps": 1e-5}, "the text tower")
    return _tower(config) | {"vocab_size": config["vocab_size"], "length": config["max_position_embeddings"]}


def image_config(config: Mapping[str, Any]) -> dict:
    """`CLIPVisionConfig` -> keyword arguments of `ImageTower`.

    Raises:
      ValueError: when the tower has what ours has not.
    """
    config = IMAGE_DEFAULTS | dict(config)
    expect(config, {"layer_norm_eps": 1e-5, "num_channels": 3}, "the image tower")
    return _tower(config) | {"image_size": config["image_size"], "patch_size": config["patch_size"]}


def transformers_config(text: Mapping[str, Any] | None, image: Mapping[str, Any] | None, embed_dim: int) -> dict:
    """Keyword arguments of `CLIP` from the configurations of its halves, None for one that is not there.

    Raises:
      ValueError: when a half has what ours has not, or the two have different activations.
    """
    halves = [defaults | dict(half) for defaults, half in ((TEXT_DEFAULTS, text), (IMAGE_DEFAULTS, image)) if half is not None]
    used = {half["hidden_act"] for half in halves}
    if len(used) != 1 or not used <= {"quick_gelu", "gelu"}:
        raise ValueError(f"CLIP's towers have the activations {', '.join(sorted(map(str, used)))}; one of quick_gelu, gelu is known here")
    return {
        "embed_dim": embed_dim,
        "text": None if text is None else text_config(text),
        "image": None if image is None else image_config(image),
        "activation": used.pop(),
    }


def openai_config(shape: Callable[[str], tuple[int, ...]], names: Iterable[str]) -> dict:
    """Keyword arguments of `CLIP` read off the shapes of OpenAI's tensors; heads are of 64 channels.

    Raises:
      KeyError: when a tensor is missing.
    """
    layers = lambda prefix: len({m.group(1) for n in names if (m := re.match(rf"{prefix}transformer\.resblocks\.(\d+)\.", n))})  # noqa: E731
    width, _, patch, _ = shape("visual.conv1.weight")
    side = math.isqrt(shape("visual.positional_embedding")[0] - 1)
    vocab_size, text_width = shape("token_embedding.weight")
    ratio = lambda prefix, width: shape(f"{prefix}transformer.resblocks.0.mlp.c_fc.weight")[0] / width  # noqa: E731
    image = {"width": width, "layers": layers(r"visual\."), "heads": width // 64, "mlp_ratio": ratio("visual.", width)}
    text = {"width": text_width, "layers": layers(""), "heads": text_width // 64, "mlp_ratio": ratio("", text_width)}
    image |= {"image_size": side * patch, "patch_size": patch}
    text |= {"vocab_size": vocab_size, "length": shape("positional_embedding")[0]}
    return {"embed_dim": shape("text_projection")[1], "text": text, "image": image, "activation": "quick_gelu"}
