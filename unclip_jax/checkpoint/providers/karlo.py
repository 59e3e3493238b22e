"""Karlo, the openly trained unCLIP, in the folder layout of diffusers: prior, decoder with its text projection, super-resolution.

Our networks have its topology, so the tables only rename: a tensor of theirs is a parameter of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unclip_jax.checkpoint.convert import Rule, expect, linear, norm


def _attention(theirs: str, ours: str) -> list[Rule]:
    return [
        *linear(rf"{theirs}to_q", f"{ours}/query", "heads"),
        *linear(rf"{theirs}to_k", f"{ours}/key", "heads"),
        *linear(rf"{theirs}to_v", f"{ours}/value", "heads"),
        *linear(rf"{theirs}to_out\.0", f"{ours}/out", "merge"),
    ]


_BLOCK, _OURS = r"transformer_blocks\.(\d+)\.", r"transformer/block_\1"
PRIOR: tuple[Rule, ...] = (
    Rule("clip_mean|clip_std", ()),  # the embedding space's
    Rule("positional_embedding", "position_embedding", "drop_ones"),
    Rule("prd_embedding", "query", "drop_ones"),
    *linear(r"time_embedding\.linear_([12])", r"time/fc\1"),
    *linear("proj_in", "z_in"),
    *linear("embedding_proj", "text_embed_in"),
    *linear("encoder_hidden_states_proj", "text_states_in"),
    *norm(rf"{_BLOCK}norm1", f"{_OURS}/ln1/norm"),
    *_attention(rf"{_BLOCK}attn1\.", f"{_OURS}/attn"),
    *norm(rf"{_BLOCK}norm3", f"{_OURS}/ln2/norm"),
    *linear(rf"{_BLOCK}ff\.net\.0\.proj", f"{_OURS}/fc1"),
    *linear(rf"{_BLOCK}ff\.net\.2", f"{_OURS}/fc2"),
    *norm("norm_out", "ln_out/norm"),
    *linear("proj_to_clip_embeddings", "z_out"),
)

TEXT_PROJ: tuple[Rule, ...] = (
    Rule("learned_classifier_free_guidance_embeddings", "conditioning/null_image_embed"),
    *linear("embedding_proj", "conditioning/text_embed_cond"),
    *linear("clip_image_embeddings_project_to_time_embeddings", "conditioning/image_embed_cond"),
    *linear("clip_extra_context_tokens_proj", "conditioning/image_embed_tokens"),
    *linear("encoder_hidden_states_proj", "conditioning/text_states_in"),
    *norm("text_encoder_hidden_states_norm", "conditioning/text_states_norm/norm"),
)


def _res(theirs: str, ours: str) -> list[Rule]:
    return [
        *(rule for n in "12" for rule in norm(rf"{theirs}norm{n}", f"{ours}/norm{n}")),
        *(rule for n in "12" for rule in linear(rf"{theirs}conv{n}", f"{ours}/conv{n}", "conv")),
        *linear(rf"{theirs}time_emb_proj", f"{ours}/time"),
        *linear(rf"{theirs}conv_shortcut", f"{ours}/skip", "conv"),
    ]


def _cross_attention(theirs: str, ours: str) -> list[Rule]:
    return [
        *norm(rf"{theirs}group_norm", f"{ours}/norm"),
        *_attention(theirs, ours),
        *linear(rf"{theirs}add_k_proj", f"{ours}/context_key", "heads"),
        *linear(rf"{theirs}add_v_proj", f"{ours}/context_value", "heads"),
    ]


def unet(levels: int) -> tuple[Rule, ...]:
    """Rules of a U-Net of so many levels; the way up is counted from the coarsest one there, from the finest one here."""
    ways = [("down", "downsamplers", "pool", level, level) for level in range(levels)]
    ways += [("up", "upsamplers", "expand", levels - 1 - level, level) for level in range(levels)]
    return (
        *linear("conv_in", "unet/conv_in", "conv"),
        *linear(r"time_embedding\.linear_([12])", r"unet/time/fc\1"),
        *(
            rule
            for way, sampler, resample, at, level in ways
            for rule in (
                *_res(rf"{way}_blocks\.{at}\.resnets\.(\d+)\.", rf"unet/{way}_{level}_res_\1"),
                *_res(rf"{way}_blocks\.{at}\.{sampler}\.0\.", f"unet/{way}_{level}_{resample}"),
                *_cross_attention(rf"{way}_blocks\.{at}\.attentions\.(\d+)\.", rf"unet/{way}_{level}_attn_\1"),
            )
        ),
        *_res(r"mid_block\.resnets\.([01])\.", r"unet/middle_res_\1"),
        *_cross_attention(r"mid_block\.attentions\.0\.", "unet/middle_attn"),
        *norm("conv_norm_out", "unet/norm_out"),
        *linear("conv_out", "unet/conv_out", "conv"),
    )


def prior_model(config: Mapping[str, Any]) -> dict:
    """`PriorTransformer`'s configuration -> keyword arguments of `DiffusionPrior`.

    Raises:
      ValueError: when it is another transformer than Karlo's; KeyError when a number is missing.
    """
    same = {"additional_embeddings": 4, "time_embed_act_fn": "silu", "norm_in_type": None, "embedding_proj_norm_type": None}
    same |= {"encoder_hid_proj_type": "linear", "added_emb_type": "prd", "time_embed_dim": None}
    expect(config, same, "prior")
    heads, size, dim = config.get("num_attention_heads", 32), config.get("attention_head_dim", 64), config.get("embedding_dim", 768)
    for key in ("embedding_proj_dim", "clip_embed_dim"):
        if config.get(key) not in (None, dim):
            raise ValueError(f"prior: {key} is {config[key]}, but the network here works on embeddings of one size, {dim}")
    layers, length = config.get("num_layers", 20), config.get("num_embeddings", 77)
    return {"embed_dim": dim, "length": length, "width": heads * size, "heads": heads, "layers": layers}


_UNET = {
    **{"act_fn": "silu", "norm_eps": 1e-5, "freq_shift": 0, "flip_sin_to_cos": True, "center_input_sample": False},
    **{"mid_block_scale_factor": 1, "time_embedding_type": "positional", "time_embedding_dim": None},
}
PLAIN, CROSS = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"), ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")


def _unet_model(config: Mapping[str, Any], name: str) -> dict:
    widths, down, up = config["block_out_channels"], config["down_block_types"], config["up_block_types"]
    pairs = list(zip(down, reversed(up)))
    other = [pair for pair in pairs if pair not in (PLAIN, CROSS)]
    if other or not len(widths) == len(down) == len(up):
        raise ValueError(f"{name}: the U-Net here has levels of {PLAIN[0]} or {CROSS[0]}, the same on both ways, not {down} and {up}")
    if any(width % widths[0] for width in widths):
        raise ValueError(f"{name}: widths {widths} are not multiples of the first")
    size = config["sample_size"]
    return {
        "image_size": size,
        "out_channels": config["out_channels"],
        "channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "res_blocks": config["layers_per_block"],
        "attention_resolutions": [size // 2**level for level, pair in enumerate(pairs) if pair == CROSS],
        "groups": config.get("norm_num_groups", 32),
    }


def decoder_model(config: Mapping[str, Any], text_proj: Mapping[str, Any]) -> dict:
    """The decoder's `UNet2DConditionModel` and its `UnCLIPTextProjModel` -> keyword arguments of `Decoder`.

    Raises:
      ValueError: when they are other networks than Karlo's; KeyError when a number is missing.
    """
    same = _UNET | {"in_channels": 3, "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "class_embed_type": "identity"}
    same |= {"only_cross_attention": False, "resnet_time_scale_shift": "scale_shift", "resnet_skip_time_act": False}
    same |= {"encoder_hid_dim_type": None, "addition_embed_type": None, "dual_cross_attention": False, "cross_attention_norm": None}
    expect(config, same, "decoder")
    if text_proj["cross_attention_dim"] != config["cross_attention_dim"]:
        raise ValueError(f"text_proj makes tokens of {text_proj['cross_attention_dim']}, the decoder takes {config['cross_attention_dim']}")
    tokens = text_proj.get("clip_extra_context_tokens", 4)
    return {
        "unet": _unet_model(config, "decoder") | {"head_channels": config["attention_head_dim"]},
        "conditioning": {"context_dim": config["cross_attention_dim"], "clip_tokens": tokens},
    }


def upsampler_model(config: Mapping[str, Any], name: str) -> dict:
    """A super-resolution `UNet2DModel`'s configuration -> keyword arguments of `Upsampler`.

    Raises:
      ValueError: when it is another network than Karlo's; KeyError when a number is missing.
    """
    expect(config, _UNET | {"in_channels": 6, "add_attention": False, "class_embed_type": None}, name)
    shift = config.get("resnet_time_scale_shift", "default") == "scale_shift"
    return {"unet": _unet_model(config, name) | {"middle_attention": False, "scale_shift": shift}, "resize": "cubic"}


def schedule(config: Mapping[str, Any], prediction: str, name: str) -> dict:
    """`UnCLIPScheduler`'s configuration -> the part's `diffusion`.

    Raises:
      ValueError: when it is another schedule.
    """
    theirs = {"x0": "sample", "eps": "epsilon"}[prediction]
    expect(config, {"prediction_type": theirs, "clip_sample": True, "beta_schedule": "squaredcos_cap_v2"}, name)
    return {"schedule": "cosine", "num_steps": config.get("num_train_timesteps", 1000), "prediction": prediction}
