"""The names of an autoencoder's tensors in the two layouts of public weights: diffusers' and CompVis'.

Both tables fit `KLAutoencoder` and `VQAutoencoder`. On the way up, diffusers counts the levels from the
coarsest one; CompVis, like us, from the finest one. Old files of diffusers have other names in the attention.
"""

from __future__ import annotations

from unclip_jax.checkpoint.convert import Rule, linear, norm

LATENTS = (
    *linear("quant_conv", "quant_conv", "pointwise"),
    *linear("post_quant_conv", "post_quant_conv", "pointwise"),
    Rule(r"quantize\.embedding\.weight", "codebook"),
)


def _norm(theirs: str, ours: str) -> list[Rule]:
    # A plain norm, or MoVQ's.
    return [
        *norm(theirs, f"{ours}/norm"),
        *norm(rf"{theirs}\.norm_layer", f"{ours}/norm"),
        *linear(rf"{theirs}\.conv_y", f"{ours}/conv_y", "pointwise"),
        *linear(rf"{theirs}\.conv_b", f"{ours}/conv_b", "pointwise"),
    ]


def _res(theirs: str, ours: str, skip: str) -> list[Rule]:
    rules = []
    for n in "12":
        rules += [*_norm(f"{theirs}norm{n}", f"{ours}/norm{n}")]
        rules += linear(f"{theirs}conv{n}", f"{ours}/conv{n}", "conv")
    return [*rules, *linear(f"{theirs}{skip}", f"{ours}/skip", "conv")]


def _ends(way: str, norm_out: str) -> list[Rule]:
    return [
        *linear(rf"{way}\.conv_in", f"{way}/conv_in", "conv"),
        *_norm(rf"{way}\.{norm_out}", f"{way}/norm_out"),
        *linear(rf"{way}\.conv_out", f"{way}/conv_out", "conv"),
    ]


def _attention_of_diffusers(theirs: str, ours: str) -> list[Rule]:
    rules = [*_norm(f"{theirs}group_norm", f"{ours}/norm"), *_norm(f"{theirs}spatial_norm", f"{ours}/norm")]
    for new, old, name in (
        ("to_q", "query", "query"),
        ("to_k", "key", "key"),
        ("to_v", "value", "value"),
        (r"to_out\.0", "proj_attn", "out"),
    ):
        rules += linear(f"{theirs}{new}", f"{ours}/{name}") + linear(f"{theirs}{old}", f"{ours}/{name}")
    return rules


def diffusers_rules(levels: int) -> tuple[Rule, ...]:
    """Rules of the names of diffusers' `AutoencoderKL` and `VQModel`, for a network of so many levels."""
    rules = [*LATENTS]
    for way, side, sampler, resample in (
        ("encoder", "down", "downsamplers", "pool"),
        ("decoder", "up", "upsamplers", "expand"),
    ):
        rules += _ends(way, "conv_norm_out")
        for level in range(levels):
            at = level if side == "down" else levels - 1 - level
            block, ours = rf"{way}\.{side}_blocks\.{at}\.", f"{way}/{side}_{level}"
            rules += _res(rf"{block}resnets\.(\d+)\.", rf"{ours}_res_\1", "conv_shortcut")
            rules += _attention_of_diffusers(rf"{block}attentions\.(\d+)\.", rf"{ours}_attn_\1")
            rules += linear(rf"{block}{sampler}\.0\.conv", f"{ours}_{resample}/conv", "conv")
        rules += _res(rf"{way}\.mid_block\.resnets\.([01])\.", rf"{way}/middle_res_\1", "conv_shortcut")
        rules += _attention_of_diffusers(rf"{way}\.mid_block\.attentions\.0\.", f"{way}/middle_attn")
    return tuple(rules)


def _attention_of_compvis(theirs: str, ours: str) -> list[Rule]:
    rules = _norm(f"{theirs}norm", f"{ours}/norm")
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
