"""Writes a bundle of the system `stable_unclip` as a folder in diffusers' layout: the inverse of
`stable_unclip.read`, by the same rules."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.checkpoint.convert import export
from unclip_jax.checkpoint.providers import clip, karlo, karlo_export, stable_diffusion_export
from unclip_jax.checkpoint.providers.diffusers_folder import (
    VERSION,
    image_encoder_config,
    image_processor_config,
    text_encoder_config,
    write_config,
    write_network,
    write_whole,
)
from unclip_jax.checkpoint.providers.stable_unclip_config import DRAWS, NOISING, VARIES
from unclip_jax.data.tokenizer import ClipTokenizer

NORMALIZER = ("stable_diffusion", "StableUnCLIPImageNormalizer")  # its module in diffusers, and its class
log = logging.getLogger(__name__)


def text_part(bundle: Bundle) -> str:
    """The name of the part whose text states the U-Net sees."""
    return "text" if "text" in bundle.parts else "clip"


def obstacles(bundle: Bundle) -> Iterator[str]:
    """What keeps a bundle from the layout, a sentence each. There is none when it can be exported."""
    if "clip" not in bundle.parts:
        yield "it lacks clip"
        return
    yield from stable_diffusion_export.obstacles(bundle, text_part(bundle))
    latent, model = bundle.parts["latent"].config, bundle.parts["clip"].config["model"]
    if latent["embedding_space"]["kind"] != "whitened":
        yield "StableUnCLIP whitens z_i by mean and standard deviation"
    if latent["augmentation"].get("zero_snr"):
        yield "the noise on z_i has no zero terminal SNR in StableUnCLIP"
    if "prior_diffusion" not in bundle.parts:
        if model["image"] is None:
            yield "it has neither a prior nor an image tower"
        return
    if model["text"] is None or "tokenizer" not in bundle.parts["clip"].config:
        yield "its prior reads captions, and its clip part has no text tower with a tokenizer"
    sampling = bundle.sampling.get("prior_diffusion", {})
    prior = bundle.parts["prior_diffusion"].config
    yield from karlo_export.prior_obstacles(prior)
    if sampling.get("spacing", "even") != "even":
        yield from stable_diffusion_export.scheduler_obstacles(
            "prior_diffusion", prior["diffusion"], sampling
        )


def write(bundle: Bundle, path: Path, dtype: Any = np.float32) -> Path:
    """Writes a bundle in the layout of diffusers' `StableUnCLIPPipeline`, or, without a prior, of its
    `StableUnCLIPImg2ImgPipeline`. The folder appears whole or not at all.

    Args:
      bundle: with clip, latent and autoencoder; text, where the U-Net has a text tower of its own; and
        prior_diffusion, where it draws from captions. Its layout has then no place for an image tower.
      path: a folder that is empty or does not exist yet.
      dtype: of the tensors.

    Returns:
      The folder, with pathlib's methods.

    Raises:
      ValueError: naming everything that keeps the bundle from this layout, or when the folder is not empty.
    """
    return write_whole(bundle, path, dtype, obstacles, _write_folders)


def _write_folders(bundle: Bundle, path: Path, dtype: Any) -> None:
    index = stable_diffusion_export.write_parts(bundle, path, dtype, text_part(bundle))
    latent, clip_part = bundle.parts["latent"].config, bundle.parts["clip"]
    space, model = latent["embedding_space"], clip_part.config["model"]
    tensors = {name: np.asarray(space[name], np.float32)[None] for name in ("mean", "std")}
    settings = {"embedding_dim": model["embed_dim"]}
    # The statistics stay in float32, as diffusers uses them.
    write_network(path / "image_normalizer", ("diffusers", NORMALIZER[1]), settings, tensors, np.float32)
    noising = {"_class_name": NOISING, "_diffusers_version": VERSION}
    noising |= stable_diffusion_export.noise_schedule(latent["augmentation"])
    write_config(path / "image_noising_scheduler" / "scheduler_config.json", noising)
    index |= {"image_normalizer": list(NORMALIZER), "image_noising_scheduler": ["diffusers", NOISING]}
    draws = "prior_diffusion" in bundle.parts
    index |= (_write_prior if draws else _write_encoder)(bundle, path, dtype)
    if draws and model["image"] is not None:
        log.warning("%s has no place for the image tower of the part clip, which is left out", DRAWS)
    header = {"_class_name": DRAWS if draws else VARIES, "_diffusers_version": VERSION}
    write_config(path / "model_index.json", header | index)


def _write_encoder(bundle: Bundle, path: Path, dtype: Any) -> dict[str, list[str]]:
    part, reader = bundle.parts["clip"], ("transformers", "CLIPVisionModelWithProjection")
    tensors = export({"image_tower": part.params["image_tower"]}, clip.IMAGE, "the image encoder")
    model = part.config["model"]
    write_network(path / "image_encoder", reader, image_encoder_config(model), tensors, dtype)
    write_config(path / "feature_extractor" / "preprocessor_config.json", image_processor_config(model))
    return {"image_encoder": list(reader), "feature_extractor": ["transformers", "CLIPImageProcessor"]}


def _write_prior(bundle: Bundle, path: Path, dtype: Any) -> dict[str, list[str]]:
    part, prior = bundle.parts["clip"], bundle.parts["prior_diffusion"]
    readers = {
        "prior": ("diffusers", "PriorTransformer"),
        "prior_text_encoder": ("transformers", "CLIPTextModelWithProjection"),
        "prior_tokenizer": ("transformers", "CLIPTokenizer"),
    }
    tensors = export(prior.params, karlo.PRIOR, "the prior") | karlo_export.statistics(prior)
    settings = karlo_export.prior_config(prior.config["model"])
    write_network(path / "prior", readers["prior"], settings, tensors, dtype)
    tower = export({"text_tower": part.params["text_tower"]}, clip.TEXT, "the prior's text encoder")
    settings = text_encoder_config(part.config["model"])
    write_network(path / "prior_text_encoder", readers["prior_text_encoder"], settings, tower, dtype)
    ClipTokenizer.from_config(part.config["tokenizer"]).save_folder(path / "prior_tokenizer")
    sampling = bundle.sampling.get("prior_diffusion", {})
    if sampling.get("spacing", "even") == "even":
        scheduler = karlo_export.scheduler_config(prior, sampling, "prior_scheduler")
    else:
        scheduler = stable_diffusion_export.scheduler_config(prior, sampling)
    write_config(path / "prior_scheduler" / "scheduler_config.json", scheduler)
    index = {name: list(reader) for name, reader in readers.items()}
    return index | {"prior_scheduler": ["diffusers", scheduler["_class_name"]]}
