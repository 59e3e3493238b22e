"""Writes a bundle of the system `kandinsky` as folders of diffusers' pipelines: the inverse of
`kandinsky.read`, by the same rules.

DIR/prior     KandinskyV22PriorPipeline
DIR/decoder   KandinskyV22Pipeline
DIR/inpaint   KandinskyV22InpaintPipeline, if the bundle has a decoder that inpaints
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part
from unclip_jax.checkpoint.convert import export
from unclip_jax.checkpoint.providers import autoencoder, clip, kandinsky, karlo, karlo_export
from unclip_jax.checkpoint.providers.diffusers_folder import (
    VERSION,
    image_encoder_config,
    image_processor_config,
    text_encoder_config,
    write_config,
    write_network,
    write_whole,
)
from unclip_jax.checkpoint.providers.kandinsky_config import CLASSES, PIPELINES, TOKENS
from unclip_jax.checkpoint.providers.stable_diffusion_export import scheduler_config, scheduler_obstacles
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.models.kandinsky import KandinskyDecoder

NEEDED = ("clip", "prior_diffusion", "latent", "autoencoder")
DECODERS = {"latent": "decoder", "latent_inpaint": "inpaint"}  # part -> the role of its pipeline


def obstacles(bundle: Bundle) -> Iterator[str]:
    """What keeps a bundle from the layout, a sentence each. There is none when it can be exported."""
    missing = [name for name in NEEDED if name not in bundle.parts]
    if missing:
        yield f"it lacks {', '.join(missing)}"
        return
    clip_part, vae = bundle.parts["clip"].config, bundle.parts["autoencoder"].config
    text, image = clip_part["model"]["text"], clip_part["model"]["image"]
    if text is None or image is None or "tokenizer" not in clip_part:
        yield "its clip part lacks a text tower with a tokenizer, or an image tower"
    elif text["width"] != clip_part["model"]["embed_dim"]:
        yield "its text states are not of the embeddings' size"
    yield from karlo_export.prior_obstacles(bundle.parts["prior_diffusion"].config)
    if vae["kind"] != "vq_autoencoder" or vae["scale_factor"] != 1:
        yield "its autoencoder is no VQ autoencoder with the scale factor 1, as MoVQ is"
    for name in (name for name in DECODERS if name in bundle.parts):
        config = bundle.parts[name].config
        if config["kind"] != "kandinsky":
            yield f"its part {name} is of the kind {config['kind']}"
            continue
        model, sampling = config["model"], bundle.sampling.get(name, {})
        unet = model["unet"]
        if model.get("clip_tokens", TOKENS) != TOKENS:
            yield f"{name} has {model['clip_tokens']} tokens of z_i, and Kandinsky's {TOKENS}"
        if unet["out_channels"] != 2 * model["latent_channels"]:
            yield f"{name} predicts no variance, and Kandinsky's does"
        if not (unet.get("middle_attention", True) and unet.get("scale_shift", True)):
            yield f"{name} has no attention in the middle, or does not scale and shift by the time"
        if sampling.get("sampler", "ddpm") not in ("ddpm", "ddim"):
            yield f"Kandinsky's samplers are ddpm and ddim, not {sampling['sampler']}"
        else:
            yield from scheduler_obstacles(name, config["diffusion"], sampling)


def write(bundle: Bundle, path: Path, dtype: Any = np.float32) -> Path:
    """Writes a bundle as folders of pipelines (module docstring), all of them or none.

    Args:
      bundle: with clip, prior_diffusion, latent and autoencoder; latent_inpaint too where there is one.
      path: a folder that is empty or does not exist yet.
      dtype: of the tensors.

    Returns:
      The folder, with pathlib's methods.

    Raises:
      ValueError: naming everything that keeps the bundle from this layout, or when the folder is not empty.
    """
    return write_whole(bundle, path, dtype, obstacles, _write_folders)


def _reader(role: str, folder: str) -> tuple[str, str]:
    theirs = CLASSES[role][folder][0]
    return "transformers" if theirs.startswith("CLIP") else "diffusers", theirs


def _write_index(path: Path, role: str, scheduler: str) -> None:
    # The scheduler's class is the one that its part is sampled with.
    index = {folder: list(_reader(role, folder)) for folder in CLASSES[role]}
    index |= {"scheduler": ["diffusers", scheduler]}
    head = {"_class_name": PIPELINES[role][0], "_diffusers_version": VERSION}
    write_config(path / "model_index.json", head | index)


def _write_folders(bundle: Bundle, path: Path, dtype: Any) -> None:
    (path / "prior").mkdir()
    _write_prior(bundle, path / "prior", dtype)
    for name, role in DECODERS.items():
        if name in bundle.parts:
            (path / role).mkdir()
            part, sampling = bundle.parts[name], bundle.sampling.get(name, {})
            _write_decoder(part, sampling, bundle.parts["autoencoder"], path / role, role, dtype)


def _write_prior(bundle: Bundle, path: Path, dtype: Any) -> None:
    clip_part, prior = bundle.parts["clip"], bundle.parts["prior_diffusion"]
    model = clip_part.config["model"]

    def network(folder: str, config: dict, tensors: dict) -> None:
        write_network(path / folder, _reader("prior", folder), config, tensors, dtype)

    tokenizer = ClipTokenizer.from_config(clip_part.config["tokenizer"])
    for half, config, rules in (
        ("text", text_encoder_config(model) | {"pad_token_id": tokenizer.pad_id}, clip.TEXT),
        ("image", image_encoder_config(model), clip.IMAGE),
    ):
        tower = {f"{half}_tower": clip_part.params[f"{half}_tower"]}
        network(f"{half}_encoder", config, export(tower, rules, f"{half}_encoder"))
    tensors = export(prior.params, karlo.PRIOR, "prior") | karlo_export.statistics(prior)
    network("prior", karlo_export.prior_config(prior.config["model"]), tensors)
    sampling = bundle.sampling.get("prior_diffusion", {})
    scheduler = karlo_export.scheduler_config(prior, sampling, "the prior")
    write_config(path / "scheduler" / "scheduler_config.json", scheduler)
    tokenizer.save_folder(path / "tokenizer")
    write_config(path / "image_processor" / "preprocessor_config.json", image_processor_config(model))
    _write_index(path, "prior", scheduler["_class_name"])


def _write_decoder(part: Part, sampling: dict, vae: Part, path: Path, role: str, dtype: Any) -> None:
    model = part.config["model"]
    config = karlo_export.unet_config(model["unet"]) | {
        "in_channels": KandinskyDecoder(**model).in_channels,
        "cross_attention_dim": model["context_dim"],
        "attention_head_dim": model["unet"].get("head_channels", 64),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "addition_embed_type": "image",
        "encoder_hid_dim": model["embed_dim"],
        "encoder_hid_dim_type": "image_proj",
    }
    tensors = export(part.params, kandinsky.unet(model), f"{role}/unet")
    write_network(path / "unet", _reader(role, "unet"), config, tensors, dtype)
    tensors = export(vae.params, autoencoder.rules_of(vae.config["model"]), f"{role}/movq")
    movq = autoencoder.diffusers_config(vae.config)
    write_network(path / "movq", _reader(role, "movq"), movq, tensors, dtype)
    scheduler = scheduler_config(part, sampling)
    write_config(path / "scheduler" / "scheduler_config.json", scheduler)
    _write_index(path, role, scheduler["_class_name"])
