"""Writes a bundle of the system `latent` as a Stable Diffusion folder in diffusers' layout: the inverse of
`stable_diffusion.read`, by the same rules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part
from unclip_jax.checkpoint.convert import export
from unclip_jax.checkpoint.providers import autoencoder, clip, latent_names, stable_diffusion_config
from unclip_jax.checkpoint.providers.diffusers_folder import (
    VERSION,
    text_encoder_config,
    write_config,
    write_network,
    write_whole,
)
from unclip_jax.data.tokenizer import ClipTokenizer

LIBRARIES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
}
SCHEDULERS = {ours: theirs for theirs, ours in stable_diffusion_config.SCHEDULERS.items()}
VARIANCES = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}
BETA_SCHEDULES = {ours: theirs for theirs, ours in stable_diffusion_config.ALL_SCHEDULES.items()}
PREDICTIONS = {ours: theirs for theirs, ours in stable_diffusion_config.PREDICTIONS.items()}


def obstacles(bundle: Bundle, text: str = "clip") -> Iterator[str]:
    """What keeps a bundle from the layout, a sentence each. There is none when it can be exported.

    text: the part whose text tower the U-Net sees.
    """
    missing = [name for name in (text, "latent", "autoencoder") if name not in bundle.parts]
    if missing:
        yield f"it lacks {', '.join(missing)}"
        return
    clip_part, latent, vae = (bundle.parts[name].config for name in (text, "latent", "autoencoder"))
    if clip_part["model"]["text"] is None or "tokenizer" not in clip_part:
        yield f"its {text} part has no text tower with a tokenizer"
    if vae["kind"] != "kl_autoencoder":
        yield f"its autoencoder is a {vae['kind']}, and Stable Diffusion's a kl_autoencoder"
    elif list(vae["model"].get("attention_levels", ())):
        yield "its autoencoder has attention in levels, and Stable Diffusion's in the middle alone"
    model, sampling = latent["model"], bundle.sampling.get("latent", {})
    if model.get("transformer_depth", 1) == 0 or model.get("resample", "conv") != "conv":
        yield "its U-Net has other blocks than Stable Diffusion's"
    if model.get("scale_shift"):
        yield "its U-Net scales and shifts by the time, and Stable Diffusion's adds"
    yield from scheduler_obstacles("latent", latent["diffusion"], sampling)


def scheduler_obstacles(name: str, diffusion: dict, sampling: dict) -> Iterator[str]:
    """What keeps a part's schedule and its sampling defaults from one of diffusers' schedulers, a sentence
    each."""
    if diffusion["schedule"] not in BETA_SCHEDULES or (
        name == "latent" and diffusion["schedule"] == "cosine"
    ):
        yield f"its noise schedule is {diffusion['schedule']}"
    if sampling.get("spacing", "even") == "even":
        yield f"its steps are spread by the spacing even: bundle it with {name}.spacing=leading, say"
    if sampling.get("sampler", "ddpm") == "ddpm":
        if sampling.get("variance", "small") not in VARIANCES:
            yield f"its variance {sampling['variance']} is none of {', '.join(VARIANCES)}"
        if sampling.get("threshold") is not None and sampling.get("clip") != 1:
            yield f"diffusers thresholds with the clip 1, not {sampling.get('clip')}"
    elif sampling.get("clip") is not None:
        yield f"its sampler {sampling['sampler']} clips, and diffusers' does not in latents"


def write(bundle: Bundle, path: Path, dtype: Any = np.float32) -> Path:
    """Writes a bundle in the layout of diffusers' `StableDiffusionPipeline`, or its inpainting one. The
    folder appears whole or not at all.

    Args:
      bundle: with clip, latent and autoencoder.
      path: a folder that is empty or does not exist yet.
      dtype: of the tensors.

    Returns:
      The folder, with pathlib's methods.

    Raises:
      ValueError: naming everything that keeps the bundle from this layout, or when the folder is not empty.
    """
    return write_whole(bundle, path, dtype, obstacles, _write_folders)


def _write_folders(bundle: Bundle, path: Path, dtype: Any) -> None:
    index = write_parts(bundle, path, dtype)
    model = bundle.parts["latent"].config["model"]
    inpaints = model["in_channels"] != model["out_channels"]
    pipeline = "StableDiffusionInpaintPipeline" if inpaints else "StableDiffusionPipeline"
    index |= {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}
    header = {"_class_name": pipeline, "_diffusers_version": VERSION, "requires_safety_checker": False}
    write_config(path / "model_index.json", header | index)


def write_parts(bundle: Bundle, path: Path, dtype: Any, text: str = "clip") -> dict[str, list[str]]:
    """Writes the folders that Stable Diffusion's family shares: text tower, U-Net, autoencoder, scheduler.

    Args:
      bundle: the parts. path, dtype: as in `write`.
      text: the part whose text tower the U-Net sees.

    Returns:
      What the pipeline's index says of them.
    """
    clip_part, latent, vae = (bundle.parts[name] for name in (text, "latent", "autoencoder"))

    def network(folder: str, config: dict, tensors: dict) -> None:
        write_network(path / folder, LIBRARIES[folder], config, tensors, dtype)

    tower = {k: v for k, v in clip_part.params["text_tower"].items() if k != "projection"}
    settings = text_encoder_config(clip_part.config["model"])
    tokenizer = ClipTokenizer.from_config(clip_part.config["tokenizer"])
    settings["pad_token_id"] = tokenizer.pad_id
    network("text_encoder", settings, export({"text_tower": tower}, clip.TEXT, "the text encoder"))
    rules = autoencoder.diffusers_rules(len(vae.config["model"]["channel_mult"]))
    network("vae", autoencoder.diffusers_config(vae.config), export(vae.params, rules, "the autoencoder"))
    model = latent.config["model"]
    network("unet", _unet(model), export(latent.params, latent_names.diffusers_unet(model), "the U-Net"))
    scheduler = scheduler_config(latent, bundle.sampling["latent"])
    write_config(path / "scheduler" / "scheduler_config.json", scheduler)
    tokenizer.save_folder(path / "tokenizer")
    index = {folder: list(reader) for folder, reader in LIBRARIES.items()}
    return index | {"scheduler": ["diffusers", scheduler["_class_name"]]}


def _unet(model: dict) -> dict:
    attends = [level in model.get("attention_levels", ()) for level in range(len(model["channel_mult"]))]
    vector = model.get("vector_dim")
    projected = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": vector}
    return {
        "sample_size": model["image_size"],
        "in_channels": model["in_channels"],
        "out_channels": model["out_channels"],
        "layers_per_block": model["res_blocks"],
        "block_out_channels": [model["channels"] * mult for mult in model["channel_mult"]],
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "cross_attention_dim": model["context_dim"],
        "attention_head_dim": list(model["heads"]),
        "transformer_layers_per_block": model.get("transformer_depth", 1),
        "use_linear_projection": model.get("linear", False),
        "norm_num_groups": model.get("groups", 32),
        **(projected if vector else {}),
    }


def noise_schedule(diffusion: dict) -> dict:
    """The keys of diffusers' schedulers for a noise schedule: a part's `diffusion` or `augmentation`."""
    config = {
        "num_train_timesteps": diffusion["num_steps"],
        "beta_schedule": BETA_SCHEDULES[diffusion["schedule"]],
    }
    if diffusion["schedule"] == "cosine":
        return config
    scale = 1000 / diffusion["num_steps"]
    ends = {"linear": (1e-4, 0.02), "scaled_linear": stable_diffusion_config.BETA_ENDS}
    first, last = diffusion.get("beta_ends") or (scale * end for end in ends[diffusion["schedule"]])
    return config | {"beta_start": first, "beta_end": last}


def scheduler_config(part: Part, sampling: dict) -> dict:
    """diffusers' configuration of the scheduler that samples a part with these defaults."""
    diffusion, sampler = part.config["diffusion"], sampling.get("sampler", "ddpm")
    clean = sampling.get("last", "clean") == "clean"
    config = {
        "_class_name": SCHEDULERS[sampler],
        "_diffusers_version": VERSION,
        **noise_schedule(diffusion),
        "prediction_type": PREDICTIONS[diffusion["prediction"]],
        "timestep_spacing": sampling["spacing"],
        "steps_offset": sampling.get("offset", 0),
    }
    if sampler in ("ddim", "plms"):
        config["set_alpha_to_one"] = clean
        config |= {"clip_sample": False} if sampler == "ddim" else {"skip_prk_steps": True}
    elif sampler == "ddpm":
        bound, threshold = sampling.get("clip"), sampling.get("threshold")
        config |= {"variance_type": VARIANCES[sampling.get("variance", "small")]}
        config |= {"clip_sample": bound is not None, "thresholding": threshold is not None}
        config |= {} if bound is None else {"clip_sample_range": bound}
        if threshold is not None:
            most = sampling.get("threshold_most") or np.finfo(np.float32).max
            config |= {"dynamic_thresholding_ratio": threshold / 100, "sample_max_value": float(most)}
    elif sampler != "euler_ancestral":
        config["final_sigmas_type"] = "zero" if clean else "sigma_min"
    if sampler != "plms":
        config["rescale_betas_zero_snr"] = bool(diffusion.get("zero_snr", False))
    return config
