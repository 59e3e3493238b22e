"""Names of the latent U-Net's parameters: diffusers' `UNet2DConditionModel`, and CompVis' `UNetModel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unclip_jax.checkpoint.convert import Rule, linear, norm
from unclip_jax.checkpoint.providers.karlo import attention, res_block, ways


def _transformer(theirs: str, ours: str, projection: str) -> list[Rule]:
    # Both libraries have the same names inside a spatial transformer; patterns may not nest groups, so the
    # number of the block is the last group.
    at = rf"{theirs}transformer_blocks\.(\d+)\."
    to = rf"{ours}/block_\{theirs.count('(') + 1}"
    return [
        *norm(rf"{theirs}norm", f"{ours}/norm"),
        *linear(rf"{theirs}proj_in", f"{ours}/proj_in", projection),
        *linear(rf"{theirs}proj_out", f"{ours}/proj_out", projection),
        *(rule for n in "123" for rule in norm(rf"{at}norm{n}", f"{to}/ln{n}/norm")),
        *attention(rf"{at}attn1\.", f"{to}/self_attn"),
        *attention(rf"{at}attn2\.", f"{to}/cross_attn"),
        *linear(rf"{at}ff\.net\.0\.proj", f"{to}/fc1"),
        *linear(rf"{at}ff\.net\.2", f"{to}/fc2"),
    ]


def diffusers_unet(unet: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Rules of diffusers' names.

    Args:
      unet: keyword arguments of `LatentUNet`.
    """
    levels, projection = len(unet["channel_mult"]), "linear" if unet.get("linear") else "conv"
    return (
        *linear("conv_in", "conv_in", "conv"),
        *linear(r"time_embedding\.linear_([12])", r"time/fc\1"),
        *linear(r"class_embedding\.linear_([12])", r"vector_fc\1"),
        *(
            rule
            for way, sampler, resample, at, level in ways(levels)
            for rule in (
                *res_block(rf"{way}_blocks\.{at}\.resnets\.(\d+)\.", rf"{way}_{level}_res_\1"),
                *linear(rf"{way}_blocks\.{at}\.{sampler}\.0\.conv", f"{way}_{level}_{resample}", "conv"),
                *_transformer(
                    rf"{way}_blocks\.{at}\.attentions\.(\d+)\.", rf"{way}_{level}_attn_\1", projection
                ),
            )
        ),
        *res_block(r"mid_block\.resnets\.([01])\.", r"middle_res_\1"),
        *_transformer(r"mid_block\.attentions\.0\.", "middle_attn", projection),
        *norm("conv_norm_out", "norm_out"),
        *linear("conv_out", "conv_out", "conv"),
    )


def _compvis_res(theirs: str, ours: str) -> list[Rule]:
    return [
        *norm(rf"{theirs}in_layers\.0", f"{ours}/norm1"),
        *linear(rf"{theirs}in_layers\.2", f"{ours}/conv1", "conv"),
        *linear(rf"{theirs}emb_layers\.1", f"{ours}/time"),
        *norm(rf"{theirs}out_layers\.0", f"{ours}/norm2"),
        *linear(rf"{theirs}out_layers\.3", f"{ours}/conv2", "conv"),
        *linear(rf"{theirs}skip_connection", f"{ours}/skip", "conv"),
    ]


def compvis_unet(unet: Mapping[str, Any]) -> tuple[Rule, ...]:
    """As `diffusers_unet`, for the names of CompVis: the blocks of all levels are numbered through."""
    levels, count = len(unet["channel_mult"]), unet["res_blocks"]
    projection = "linear" if unet.get("linear") else "conv"
    rules = [
        *linear(r"time_embed\.0", "time/fc1"),
        *linear(r"time_embed\.2", "time/fc2"),
        *linear(r"label_emb\.0\.0", "vector_fc1"),
        *linear(r"label_emb\.0\.2", "vector_fc2"),
        *linear(r"input_blocks\.0\.0", "conv_in", "conv"),
    ]
    for level in range(levels):
        first = 1 + level * (count + 1)
        for i in range(count):
            rules += _compvis_res(rf"input_blocks\.{first + i}\.0\.", f"down_{level}_res_{i}")
            rules += _transformer(rf"input_blocks\.{first + i}\.1\.", f"down_{level}_attn_{i}", projection)
        rules += linear(rf"input_blocks\.{first + count}\.0\.op", f"down_{level}_pool", "conv")
        first = (levels - 1 - level) * (count + 1)
        for i in range(count + 1):
            rules += _compvis_res(rf"output_blocks\.{first + i}\.0\.", f"up_{level}_res_{i}")
            rules += _transformer(rf"output_blocks\.{first + i}\.1\.", f"up_{level}_attn_{i}", projection)
        place = 2 if level in unet["attention_levels"] else 1
        rules += linear(rf"output_blocks\.{first + count}\.{place}\.conv", f"up_{level}_expand", "conv")
    return (
        *rules,
        *_compvis_res(r"middle_block\.0\.", "middle_res_0"),
        *_transformer(r"middle_block\.1\.", "middle_attn", projection),
        *_compvis_res(r"middle_block\.2\.", "middle_res_1"),
        *norm(r"out\.0", "norm_out"),
        *linear(r"out\.2", "conv_out", "conv"),
    )
