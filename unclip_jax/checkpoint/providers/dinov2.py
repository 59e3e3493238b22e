"""DINOv2 of transformers (`Dinov2Model`, `Dinov2WithRegistersModel`): S, B and L.

A folder with `config.json` and the weights. Its `preprocessor_config.json` is read for the images' statistics
alone: figures say themselves how images are resized.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unclip_jax.checkpoint.bundle import Bundle, Part, no_part
from unclip_jax.checkpoint.convert import Rule, array, convert, linear, norm, shapes_of
from unclip_jax.checkpoint.files import Place, open_weights, read_json
from unclip_jax.checkpoint.settings import STATED, Settings
from unclip_jax.errors import InputError
from unclip_jax.models.dinov2 import MEAN, STD, DINOv2
from unclip_jax.typed import shown

NAME = "dinov2"
TYPES = ("dinov2", "dinov2_with_registers")
_LAYER = r"encoder\.layer\.(\d+)\."
RULES: tuple[Rule, ...] = (
    Rule(r"embeddings\.mask_token", ()),  # stands for patches that are hidden in training
    Rule(r"embeddings\.cls_token", "class_embedding", "drop_ones"),
    Rule(r"embeddings\.register_tokens", "register_embedding", "drop_ones"),
    Rule(r"embeddings\.position_embeddings", "position_embedding", "drop_ones"),
    *linear(r"embeddings\.patch_embeddings\.projection", "patch_embed", "conv"),
    *(
        rule
        for name in ("query", "key", "value")
        for rule in linear(rf"{_LAYER}attention\.attention\.{name}", rf"block_\1/attn/{name}", "heads")
    ),
    *linear(rf"{_LAYER}attention\.output\.dense", r"block_\1/attn/out", "merge"),
    *norm(rf"{_LAYER}norm([12])", r"block_\1/ln\2/norm"),
    Rule(rf"{_LAYER}layer_scale([12])\.lambda1", r"block_\1/scale\2"),
    *linear(rf"{_LAYER}mlp\.fc([12])", r"block_\1/fc\2"),
    *norm("layernorm", "ln_final/norm"),
)
SETTINGS = Settings(
    read={
        "hidden_size": (int, 768),
        "num_hidden_layers": (int, 12),
        "num_attention_heads": (int, 12),
        "mlp_ratio": (float, 4.0),
        "image_size": (int, 224),
        "patch_size": (int, 14),
        "num_register_tokens": (int, 4),
        "model_type": (str, STATED),
    },
    same={
        "hidden_act": ("gelu",),
        "layer_norm_eps": (1e-6,),
        "qkv_bias": (True,),
        "num_channels": (3,),
        "use_swiglu_ffn": (False,),
        # With registers; the network computes this in any case.
        "interpolate_antialias": (True,),
        "interpolate_offset": (0.0,),
    },
    free=(
        *("architectures", "transformers_version", "torch_dtype", "dtype", "id2label", "label2id"),
        *("attention_probs_dropout_prob", "hidden_dropout_prob", "drop_path_rate", "initializer_range"),
        *("layerscale_value", "apply_layernorm", "out_features", "out_indices", "reshape_hidden_states"),
        *("stage_names", "use_mask_token", "return_dict", "output_attentions", "output_hidden_states"),
        *("chunk_size_feed_forward", "problem_type", "is_encoder_decoder"),
    ),
)


def model_config(config: Mapping[str, Any], name: str) -> dict:
    """`Dinov2Config` -> keyword arguments of `DINOv2`.

    Raises:
      ValueError: naming the setting with which the network differs from ours.
    """
    if config.get("use_swiglu_ffn") is True:
        raise InputError(f"{name} is a DINOv2-giant (use_swiglu_ffn); DINOv2-S, -B and -L are read here")
    taken = SETTINGS.take(config, name)
    width, heads, patch = taken["hidden_size"], taken["num_attention_heads"], taken["patch_size"]
    if width % heads:
        raise InputError(f"{name}: its width {width} is no multiple of its {heads} heads")
    model = {
        "width": width,
        "layers": taken["num_hidden_layers"],
        "heads": heads,
        "patch_size": patch,
        "positions": taken["image_size"] // patch,
        "mlp_ratio": taken["mlp_ratio"],
    }
    registers = taken["model_type"] == TYPES[1]
    return model | ({"registers": taken["num_register_tokens"]} if registers else {})


def recognises(path: Path) -> bool:
    """Whether a folder holds DINOv2."""
    if (path / "model_index.json").is_file() or not (path / "config.json").is_file():
        return False
    return read_json(path / "config.json").get("model_type") in TYPES


def read(path: Path, only: str | None, place: Place) -> Bundle:
    """Reads a folder with DINOv2 as a bundle of the one part `dinov2`; see `providers.Provider`."""
    if only not in (None, NAME):
        raise no_part(path, only, [NAME])
    model = model_config(read_json(path / "config.json"), f"{path}/config.json")
    _check_statistics(path / "preprocessor_config.json")
    side = model["positions"] * model["patch_size"]
    shapes = shapes_of(DINOv2(**model).init, array(1, side, side, 3))
    params = convert(open_weights(path), RULES, shapes, "DINOv2", place)
    part = Part({"kind": "dinov2", "model": model}, params)
    return Bundle({NAME: part}, provenance={"source": str(path)}, path=str(path))


def _check_statistics(file: Path) -> None:
    if not file.is_file():
        return
    settings = read_json(file)
    for key, ours in (("image_mean", MEAN), ("image_std", STD)):
        if settings.get(key, list(ours)) != list(ours):
            raise InputError(f"{file}: {key} is {shown(settings[key])}, but DINOv2 has {list(ours)}")
