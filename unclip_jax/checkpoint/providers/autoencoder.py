"""Autoencoders alone, in the folder layout of diffusers (`AutoencoderKL`, `VQModel`, MoVQ), and the names of
their tensors in diffusers and in CompVis' code.

Both tables of names fit `KLAutoencoder` and `VQAutoencoder`. On the way up, diffusers counts the levels from
the coarsest one; CompVis, like us, from the finest one. Old files of diffusers have other names in the
attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unclip_jax.checkpoint.bundle import Bundle, Part, no_part
from unclip_jax.checkpoint.convert import Rule, array, convert, linear, norm, shapes_of
from unclip_jax.checkpoint.files import Place, open_weights, read_json
from unclip_jax.checkpoint.settings import Settings
from unclip_jax.errors import InputError
from unclip_jax.models.kinds import KINDS
from unclip_jax.typed import shown

NAME = "autoencoder"
_READ = {
    "latent_channels": (int, 4),
    "block_out_channels": (tuple[int, ...], (64,)),
    "layers_per_block": (int, 1),
    "norm_num_groups": (int, 32),
    "scaling_factor": (float, 0.18215),
    "down_block_types": (tuple[str, ...], ("DownEncoderBlock2D",)),
    "up_block_types": (tuple[str, ...], ("UpDecoderBlock2D",)),
    "mid_block_add_attention": (bool, True),
}
_SAME = {"in_channels": (3,), "out_channels": (3,), "act_fn": ("silu",)}
_FREE = ("sample_size", "force_upcast")
# The kind of the part -> diffusers' class, and its settings.
CLASSES: dict[str, tuple[str, Settings]] = {
    "kl_autoencoder": (
        "AutoencoderKL",
        Settings(
            read=_READ,
            same=_SAME
            | {"use_quant_conv": (True,), "use_post_quant_conv": (True,), "shift_factor": (None,)}
            | {"latents_mean": (None,), "latents_std": (None,), "_class_name": ("AutoencoderKL",)},
            free=_FREE,
        ),
    ),
    "vq_autoencoder": (
        "VQModel",
        Settings(
            read=_READ
            | {
                "num_vq_embeddings": (int, 256),
                "vq_embed_dim": (int | None, None),
                "norm_type": (str, "group"),
            },
            same=_SAME | {"lookup_from_codebook": (False,), "_class_name": ("VQModel",)},
            free=_FREE,
        ),
    ),
}

LATENTS = (
    *linear("quant_conv", "quant_conv", "pointwise"),
    *linear("post_quant_conv", "post_quant_conv", "pointwise"),
    Rule(r"quantize\.embedding\.weight", "codebook"),
)


def _norm(theirs: str, ours: str, spatial: bool) -> list[Rule]:
    # A plain norm, or MoVQ's.
    if not spatial:
        return norm(theirs, f"{ours}/norm")
    return [
        *norm(rf"{theirs}\.norm_layer", f"{ours}/norm"),
        *linear(rf"{theirs}\.conv_y", f"{ours}/conv_y", "pointwise"),
        *linear(rf"{theirs}\.conv_b", f"{ours}/conv_b", "pointwise"),
    ]


def _res(theirs: str, ours: str, skip: str, spatial: bool = False) -> list[Rule]:
    rules = []
    for n in "12":
        rules += _norm(f"{theirs}norm{n}", f"{ours}/norm{n}", spatial)
        rules += linear(f"{theirs}conv{n}", f"{ours}/conv{n}", "conv")
    return [*rules, *linear(f"{theirs}{skip}", f"{ours}/skip", "conv")]


def _ends(way: str, norm_out: str, spatial: bool = False) -> list[Rule]:
    return [
        *linear(rf"{way}\.conv_in", f"{way}/conv_in", "conv"),
        *_norm(rf"{way}\.{norm_out}", f"{way}/norm_out", spatial),
        *linear(rf"{way}\.conv_out", f"{way}/conv_out", "conv"),
    ]


def _attention_of_diffusers(theirs: str, ours: str, spatial: bool) -> list[Rule]:
    rules = _norm(f"{theirs}{'spatial' if spatial else 'group'}_norm", f"{ours}/norm", spatial)
    for new, old, name in (
        ("to_q", "query", "query"),
        ("to_k", "key", "key"),
        ("to_v", "value", "value"),
        (r"to_out\.0", "proj_attn", "out"),
    ):
        rules += linear(f"{theirs}{new}", f"{ours}/{name}") + linear(f"{theirs}{old}", f"{ours}/{name}")
    return rules


def diffusers_rules(levels: int, spatial_norm: bool = False) -> tuple[Rule, ...]:
    """Rules of the names of diffusers' `AutoencoderKL` and `VQModel`, for a network of so many levels.

    spatial_norm: the decoder's norms are MoVQ's.
    """
    rules = [*LATENTS]
    for way, side, sampler, resample in (
        ("encoder", "down", "downsamplers", "pool"),
        ("decoder", "up", "upsamplers", "expand"),
    ):
        spatial = spatial_norm and way == "decoder"
        rules += _ends(way, "conv_norm_out", spatial)
        for level in range(levels):
            at = level if side == "down" else levels - 1 - level
            block, ours = rf"{way}\.{side}_blocks\.{at}\.", f"{way}/{side}_{level}"
            rules += _res(rf"{block}resnets\.(\d+)\.", rf"{ours}_res_\1", "conv_shortcut", spatial)
            rules += _attention_of_diffusers(rf"{block}attentions\.(\d+)\.", rf"{ours}_attn_\1", spatial)
            rules += linear(rf"{block}{sampler}\.0\.conv", f"{ours}_{resample}/conv", "conv")
        middle = rf"{way}\.mid_block\."
        rules += _res(rf"{middle}resnets\.([01])\.", rf"{way}/middle_res_\1", "conv_shortcut", spatial)
        rules += _attention_of_diffusers(rf"{middle}attentions\.0\.", f"{way}/middle_attn", spatial)
    return tuple(rules)


def rules_of(model: Mapping[str, Any]) -> tuple[Rule, ...]:
    """`diffusers_rules` for an autoencoder with these keyword arguments."""
    return diffusers_rules(len(model["channel_mult"]), model.get("spatial_norm", False))


def _attention_of_compvis(theirs: str, ours: str) -> list[Rule]:
    rules = _norm(f"{theirs}norm", f"{ours}/norm", False)
    for name, target in (("q", "query"), ("k", "key"), ("v", "value"), ("proj_out", "out")):
        rules += linear(f"{theirs}{name}", f"{ours}/{target}", "pointwise")
    return rules


def compvis_rules(prefix: str = "") -> tuple[Rule, ...]:
    """Rules of the names of CompVis (taming-transformers, latent-diffusion, Stable Diffusion).

    Args:
      prefix: regex before every name; a Stable Diffusion file has `first_stage_model\\.`. It has no group.
    """
    rules = [*LATENTS]
    for way, side, sampler, resample in (
        ("encoder", "down", "downsample", "pool"),
        ("decoder", "up", "upsample", "expand"),
    ):
        block, ours = rf"{way}\.{side}\.(\d+)\.", rf"{way}/{side}_\1"
        rules += _ends(way, "norm_out")
        rules += _res(rf"{block}block\.(\d+)\.", rf"{ours}_res_\2", "nin_shortcut")
        rules += _attention_of_compvis(rf"{block}attn\.(\d+)\.", rf"{ours}_attn_\2")
        rules += linear(rf"{block}{sampler}\.conv", rf"{ours}_{resample}/conv", "conv")
        for n in "12":
            rules += _res(rf"{way}\.mid\.block_{n}\.", f"{way}/middle_res_{int(n) - 1}", "nin_shortcut")
        rules += _attention_of_compvis(rf"{way}\.mid\.attn_1\.", f"{way}/middle_attn")
    return tuple(Rule(prefix + rule.pattern, rule.target, rule.transform) for rule in rules)


# ------------------------------------------------------------------------------------------- a folder alone
def _kind(path: Path) -> str | None:
    # The kind of the autoencoder in a folder; None where there is none.
    if not (path / "config.json").is_file():
        return None
    name = read_json(path / "config.json").get("_class_name")
    return next((kind for kind, (theirs, _) in CLASSES.items() if theirs == name), None)


def part_config(config: Mapping[str, Any], kind: str, name: str) -> dict:
    """diffusers' configuration of an autoencoder -> the part's.

    `VQModel` has a `scaling_factor` that nothing applies, so a VQ autoencoder's scale factor is 1.

    Raises:
      ValueError: naming the setting with which the network differs from ours.
    """
    taken = CLASSES[kind][1].take(config, name)
    widths, first = tuple(taken["block_out_channels"]), taken["block_out_channels"][0]
    if any(width % first for width in widths):
        raise InputError(f"{name}: block_out_channels {shown(list(widths))} are no multiples of the first")
    ways = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    attention = {}
    for key, plain in ways.items():
        blocks = list(taken[key])
        if len(blocks) != len(widths) or set(blocks) - {plain, f"Attn{plain}"}:
            known = f"{plain} or Attn{plain}"
            raise InputError(f"{name}: {key} must be {len(widths)} of {known}, not {shown(blocks)}")
        attention[key] = [block != plain for block in blocks]
    if attention["down_block_types"] != attention["up_block_types"][::-1]:
        raise InputError(f"{name}: down_block_types and up_block_types have attention at other levels")
    if not 0 < taken["scaling_factor"] < 1e6:
        raise InputError(f"{name}: scaling_factor must be positive, not {shown(taken['scaling_factor'])}")
    model = {
        "latent_channels": taken["latent_channels"],
        "channels": first,
        "channel_mult": [width // first for width in widths],
        "res_blocks": taken["layers_per_block"],
        "attention_levels": [i for i, attends in enumerate(attention["down_block_types"]) if attends],
        "middle_attention": taken["mid_block_add_attention"],
        "groups": taken["norm_num_groups"],
    }
    if kind == "vq_autoencoder":
        if taken["vq_embed_dim"] not in (None, taken["latent_channels"]):
            raise InputError(f"{name}: vq_embed_dim must be latent_channels, not {taken['vq_embed_dim']}")
        if taken["norm_type"] not in ("group", "spatial"):
            raise InputError(f"{name}: norm_type must be group or spatial, not {shown(taken['norm_type'])}")
        model |= {"codes": taken["num_vq_embeddings"], "spatial_norm": taken["norm_type"] == "spatial"}
    scale = float(taken["scaling_factor"]) if kind == "kl_autoencoder" else 1.0
    return {"kind": kind, "model": model, "scale_factor": scale}


def diffusers_config(config: Mapping[str, Any]) -> dict:
    """diffusers' configuration of a part's autoencoder: the inverse of `part_config`."""
    model = config["model"]
    levels = range(len(model["channel_mult"]))
    attends = ["Attn" if level in model.get("attention_levels", ()) else "" for level in levels]
    written = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": model["latent_channels"],
        "block_out_channels": [model["channels"] * mult for mult in model["channel_mult"]],
        "layers_per_block": model["res_blocks"],
        "norm_num_groups": model.get("groups", 32),
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in attends],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(attends)],
        "mid_block_add_attention": model.get("middle_attention", True),
    }
    if config["kind"] == "kl_autoencoder":
        return written | {"scaling_factor": config["scale_factor"]}
    norm_type = "spatial" if model.get("spatial_norm") else "group"
    codes = {"num_vq_embeddings": model["codes"], "vq_embed_dim": model["latent_channels"]}
    return written | codes | {"norm_type": norm_type}


def recognises(path: Path) -> bool:
    """Whether a folder is an autoencoder's alone."""
    return path.is_dir() and _kind(path) is not None


def read(path: Path, only: str | None, place: Place) -> Bundle:
    """Reads a folder as a bundle of the one part `autoencoder`; see `providers.Provider`."""
    if only not in (None, NAME):
        raise no_part(path, only, [NAME])
    config = part_config(read_json(path / "config.json"), _kind(path), f"{path}/config.json")
    module = KINDS[config["kind"]].module(**config["model"])
    shapes = shapes_of(module.init, array(1, module.factor, module.factor, 3))
    rules = rules_of(config["model"])
    params = convert(open_weights(path), rules, shapes, f"{path}: the autoencoder", place)
    return Bundle({NAME: Part(config, params)}, provenance={"source": str(path)}, path=str(path))
