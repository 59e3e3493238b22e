"""Writes a bundle of Karlo's topology as a folder in diffusers' layout: the inverse of `karlo.read`, by the
same rules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part, last_step, upsamplers
from unclip_jax.checkpoint.convert import Rule, export
from unclip_jax.checkpoint.providers import clip, karlo, karlo_config
from unclip_jax.checkpoint.providers.diffusers_folder import (
    VERSION,
    text_encoder_config,
    write_config,
    write_network,
    write_whole,
)
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.errors import InputError

# The class that reads each folder: (library, name).
CLASSES = {
    **{"prior": ("diffusers", "PriorTransformer"), "decoder": ("diffusers", "UNet2DConditionModel")},
    **{
        "text_proj": ("unclip", "UnCLIPTextProjModel"),
        "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    },
    **{name: ("diffusers", "UNet2DModel") for name in ("super_res_first", "super_res_last")},
    **{
        name: ("diffusers", "UnCLIPScheduler")
        for name in ("prior_scheduler", "decoder_scheduler", "super_res_scheduler")
    },
    "tokenizer": ("transformers", "CLIPTokenizer"),
}
VARIANCES = {ours: theirs for theirs, ours in karlo_config.VARIANCES.items()}


def obstacles(bundle: Bundle) -> Iterator[str]:
    """What keeps a bundle from Karlo's layout, a sentence each. There is none when it can be exported."""
    names, needed = upsamplers(bundle.parts), ("clip", "prior_diffusion", "decoder")
    missing = [name for name in needed if name not in bundle.parts]
    if missing:
        yield f"it lacks {', '.join(missing)}"
    if len(names) != 1:
        yield f"it has {len(names)} upsamplers, and Karlo one"
    if missing or len(names) != 1:
        return
    clip_model = bundle.parts["clip"].config["model"]
    prior, decoder, upsampler = (
        bundle.parts[name].config for name in ("prior_diffusion", "decoder", names[0])
    )
    text, dim = clip_model["text"], clip_model["embed_dim"]
    if text is None or text["width"] != dim:
        yield f"Karlo's text states are of the embeddings' size {dim}, not of {text and text['width']}"
    if "tokenizer" not in bundle.parts["clip"].config:
        yield "its clip part has no tokenizer"
    yield from prior_obstacles(prior)
    for name, part, prediction in (("decoder", decoder, "eps"), ("upsampler", upsampler, "eps")):
        if part["diffusion"]["prediction"] != prediction:
            yield f"Karlo's {name} predicts {prediction}, not {part['diffusion']['prediction']}"
        if part["diffusion"]["schedule"] != "cosine":
            yield f"Karlo's {name} has the cosine schedule, not the {part['diffusion']['schedule']} one"
    if decoder["model"].get("text") is not None:
        yield "the decoder has a text encoder of its own, and Karlo's takes CLIP's states"
    conditioning = decoder["model"]["conditioning"]
    if not (conditioning.get("use_text_embed", True) and conditioning.get("use_text_states", True)):
        yield "Karlo's decoder sees the text embedding and the text states"
    for name, part, out, attends in (("decoder", decoder, 6, True), ("upsampler", upsampler, 3, False)):
        unet = part["model"]["unet"]
        if unet["out_channels"] != out:
            yield f"Karlo's {name} has {out} output channels, not {unet['out_channels']}"
        if unet.get("middle_attention", True) != attends or (
            not attends and unet.get("attention_resolutions")
        ):
            yield f"Karlo's {name} has {'attention in the middle' if attends else 'no attention'}"
    if not decoder["model"]["unet"].get("scale_shift", True):
        yield "the time embedding scales and shifts in Karlo's decoder"
    if upsampler["model"].get("resize", "cubic") != "cubic":
        yield "Karlo's upsampler enlarges with the cubic filter"


def prior_obstacles(prior: dict) -> Iterator[str]:
    """What keeps a prior of this configuration from a `PriorTransformer` like Karlo's, a sentence each."""
    if prior["diffusion"]["prediction"] != "x0":
        yield f"Karlo's prior predicts x0, not {prior['diffusion']['prediction']}"
    if prior["diffusion"]["schedule"] != "cosine":
        yield f"Karlo's prior has the cosine schedule, not the {prior['diffusion']['schedule']} one"
    if prior.get("embedding_space", {}).get("kind") != "whitened":
        yield "Karlo's prior works on embeddings whitened by mean and standard deviation"
    if prior["model"].get("text") is not None:
        yield "the prior has a text encoder of its own, and Karlo's takes CLIP's states"
    if prior["model"].get("mlp_ratio", 4.0) != 4.0 or prior["model"].get("activation", "gelu") != "gelu":
        yield "Karlo's prior has hidden layers of four times its width, and GELU"


def write(bundle: Bundle, path: Path, dtype: Any = np.float32) -> Path:
    """Writes a bundle in the layout of diffusers' `UnCLIPPipeline`. The folder appears whole or not at all.

    Args:
      bundle: with clip, prior_diffusion, decoder and one upsampler of Karlo's topology. Where the upsampler
        has no network of its own for the last step, its weights are written twice.
      path: a folder that is empty or does not exist yet.
      dtype: of the tensors.

    Returns:
      The folder, with pathlib's methods.

    Raises:
      ValueError: naming everything that keeps the bundle from this layout, or when the folder is not empty.
    """
    return write_whole(bundle, path, dtype, obstacles, _write_folders)


def _write_folders(bundle: Bundle, path: Path, dtype: Any) -> None:
    (name,) = upsamplers(bundle.parts)
    clip_part, prior, decoder, first = (bundle.parts[n] for n in ("clip", "prior_diffusion", "decoder", name))
    last, dim = bundle.parts[last_step(bundle.parts, name) or name], clip_part.config["model"]["embed_dim"]

    def network(
        folder: str, config: dict, params: Any, rules: Sequence[Rule], buffers: dict | None = None
    ) -> None:
        tensors = export(params, rules, folder) | (buffers or {})
        write_network(path / folder, CLASSES[folder], config, tensors, dtype)

    text_tower = {"text_tower": clip_part.params["text_tower"]}
    network("text_encoder", text_encoder_config(clip_part.config["model"]), text_tower, clip.TEXT)
    network("prior", prior_config(prior.config["model"]), prior.params, karlo.PRIOR, statistics(prior))
    text_proj = _text_proj(decoder.config["model"], dim)
    network("text_proj", text_proj, {"conditioning": decoder.params["conditioning"]}, karlo.TEXT_PROJ)
    network(
        "decoder", _decoder(decoder.config["model"]), {"unet": decoder.params["unet"]}, _unet_rules(decoder)
    )
    for folder, part in (("super_res_first", first), ("super_res_last", last)):
        network(folder, _upsampler(part.config["model"]), part.params, _unet_rules(part))
    for folder, sampled in (("prior", "prior_diffusion"), ("decoder", "decoder"), ("super_res", name)):
        scheduler = scheduler_config(bundle.parts[sampled], bundle.sampling.get(sampled, {}), folder)
        write_config(path / f"{folder}_scheduler" / "scheduler_config.json", scheduler)
    ClipTokenizer.from_config(clip_part.config["tokenizer"]).save_folder(path / "tokenizer")
    index = {folder: list(reader) for folder, reader in CLASSES.items()}
    write_config(
        path / "model_index.json", {"_class_name": "UnCLIPPipeline", "_diffusers_version": VERSION, **index}
    )


def _unet_rules(part: Part) -> tuple[Rule, ...]:
    return karlo.unet(len(part.config["model"]["unet"]["channel_mult"]))


def statistics(prior: Part) -> dict[str, np.ndarray]:
    """The mean and the deviation that a `PriorTransformer` holds, of a prior on whitened embeddings."""
    space = prior.config["embedding_space"]
    return {f"clip_{name}": np.asarray(space[name], np.float32)[None] for name in ("mean", "std")}


def prior_config(model: dict) -> dict:
    """`PriorTransformer`'s configuration of a `DiffusionPrior` with these keyword arguments."""
    return {
        "num_attention_heads": model["heads"],
        "attention_head_dim": model["width"] // model["heads"],
        "num_layers": model["layers"],
        "embedding_dim": model["embed_dim"],
        "num_embeddings": model["length"],
        "additional_embeddings": 4,
        "dropout": 0.0,
    }


def _text_proj(decoder: dict, embed_dim: int) -> dict:
    conditioning = decoder["conditioning"]
    return {
        "clip_extra_context_tokens": conditioning.get("clip_tokens", 4),
        "clip_embeddings_dim": embed_dim,
        "time_embed_dim": 4 * decoder["unet"]["channels"],
        "cross_attention_dim": conditioning["context_dim"],
    }


def unet_config(unet: dict) -> dict:
    """What diffusers' configurations of U-Nets say of a `UNet`."""
    sizes = [unet["image_size"] // 2**level for level in range(len(unet["channel_mult"]))]
    attends = [size in unet.get("attention_resolutions", ()) for size in sizes]
    pairs = [karlo_config.CROSS if cross else karlo_config.PLAIN for cross in attends]
    return {
        "sample_size": unet["image_size"],
        "out_channels": unet["out_channels"],
        "layers_per_block": unet["res_blocks"],
        "block_out_channels": [unet["channels"] * mult for mult in unet["channel_mult"]],
        "norm_num_groups": unet.get("groups", 32),
        "down_block_types": [down for down, _ in pairs],
        "up_block_types": [up for _, up in reversed(pairs)],
        "resnet_time_scale_shift": "scale_shift" if unet.get("scale_shift", True) else "default",
    }


def _decoder(model: dict) -> dict:
    return unet_config(model["unet"]) | {
        "in_channels": 3,
        "cross_attention_dim": model["conditioning"]["context_dim"],
        "class_embed_type": "identity",
        "attention_head_dim": model["unet"].get("head_channels", 64),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    }


def _upsampler(model: dict) -> dict:
    return unet_config(model["unet"]) | {"in_channels": 6, "add_attention": False}


def scheduler_config(part: Part, sampling: dict, name: str) -> dict:
    """`UnCLIPScheduler`'s configuration for a part. Raises a ValueError that calls it `name`."""
    variance = sampling.get("variance", "small")
    if variance not in VARIANCES:
        raise InputError(
            f"{name}: its scheduler in diffusers has no {variance} variance; "
            f"sample with one of {', '.join(VARIANCES)}"
        )
    return {
        "_class_name": "UnCLIPScheduler",
        "_diffusers_version": VERSION,
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": True,
        "clip_sample_range": sampling.get("clip") or 1.0,
        "num_train_timesteps": part.config["diffusion"]["num_steps"],
        "prediction_type": {"x0": "sample", "eps": "epsilon"}[part.config["diffusion"]["prediction"]],
        "variance_type": VARIANCES[variance],
    }
