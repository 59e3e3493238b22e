"""CLIP as open_clip saves it: `open_clip_config.json`, and `open_clip_model.safetensors` with OpenAI's names.

The configuration says what the tensors cannot: the heads, the activation and the images' statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from unclip_jax.checkpoint.bundle import Bundle, no_part
from unclip_jax.checkpoint.check import clip_shapes
from unclip_jax.checkpoint.convert import Rule, convert
from unclip_jax.checkpoint.files import Place, open_weights, read_json
from unclip_jax.checkpoint.providers import clip, preprocess
from unclip_jax.checkpoint.settings import STATED, Settings
from unclip_jax.errors import InputError

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model", "open_clip_pytorch_model", "model")
# Models with `custom_text` have "text." before the names of the text tower.
RULES: tuple[Rule, ...] = tuple(
    rule if rule.pattern.startswith("visual") else replace(rule, pattern=rf"(?:text\.)?(?:{rule.pattern})")
    for rule in clip.OPENAI
)

MODEL = Settings(
    read={
        "embed_dim": (int, STATED),
        "vision_cfg": (dict, STATED),
        "text_cfg": (dict, STATED),
        "quick_gelu": (bool, False),
    },
    free=("custom_text", "init_logit_scale", "cast_dtype", "output_dict"),
)
_BLOCKS = {"block_type": (None, "default")}
VISION = Settings(
    read={
        "layers": (int, 12),
        "width": (int, 768),
        "head_width": (int, 64),
        "mlp_ratio": (float, 4.0),
        "patch_size": (int, 16),
        "image_size": (int, 224),
    },
    same={"pos_embed_type": ("learnable",), "pool_type": ("tok",), **_BLOCKS},
    free=(
        *("patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads", "timm_pool"),
        *("timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path", "timm_model_pretrained"),
    ),
)
TEXT = Settings(
    read={
        "context_length": (int, 77),
        "vocab_size": (int, 49408),
        "width": (int, 512),
        "heads": (int, 8),
        "layers": (int, 12),
        "mlp_ratio": (float, 4.0),
    },
    same={"pool_type": ("argmax",), "proj_type": ("linear",), **_BLOCKS},
    free=(
        *("pad_id", "eos_id", "output_tokens", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
        *("hf_tokenizer_pretrained",),
    ),
)
WHOLE = Settings(
    read={"model_cfg": (dict, STATED), "preprocess_cfg": (dict, {})}, free=("version", "tag", "license")
)


def model_config(config: Mapping[str, Any], name: str = CONFIG) -> dict:
    """open_clip's configuration -> keyword arguments of `CLIP`.

    Raises:
      ValueError: naming the setting with which the network differs from ours.
    """
    whole = WHOLE.take(config, name)
    model = MODEL.take(whole["model_cfg"], f"{name}: model_cfg")
    vision = VISION.take(model["vision_cfg"], f"{name}: vision_cfg")
    text = TEXT.take(model["text_cfg"], f"{name}: text_cfg")
    for settings, heads in ((vision, "head_width"), (text, "heads")):
        if settings["width"] % settings[heads]:
            raise InputError(f"{name}: width {settings['width']} is no multiple of {heads} {settings[heads]}")
    image = {
        "width": vision["width"],
        "layers": vision["layers"],
        "heads": vision["width"] // vision["head_width"],
        "mlp_ratio": vision["mlp_ratio"],
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
    }
    image |= preprocess.of_open_clip(whole["preprocess_cfg"], image["image_size"], f"{name}: preprocess_cfg")
    words = {key: text[key] for key in ("width", "layers", "heads", "mlp_ratio", "vocab_size")}
    return {
        "embed_dim": model["embed_dim"],
        "image": image,
        "text": words | {"length": text["context_length"]},
        "activation": "quick_gelu" if model["quick_gelu"] else "gelu",
    }


def recognises(path: Path) -> bool:
    """Whether a folder holds open_clip's configuration."""
    return (path / CONFIG).is_file()


def read(path: Path, only: str | None, place: Place) -> Bundle:
    """Reads a folder of open_clip's as a bundle of the one part `clip`; see `providers.Provider`."""
    if only not in (None, "clip"):
        raise no_part(path, only, ["clip"])
    model = model_config(read_json(path / CONFIG), f"{path}/{CONFIG}")
    params = convert(open_weights(path, WEIGHTS), RULES, clip_shapes(model), "CLIP", place)
    return clip.as_bundle(path, model, params)
