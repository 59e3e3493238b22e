"""StableUnCLIP in the folder layout of diffusers: Stable Diffusion 2.1 fine-tuned to also see a noised z_i.

A bundle of the system `stable_unclip` has these parts:

clip              the CLIP of z_i: its image tower in the folder of the pipeline that varies images, and its
                  text tower in that of the pipeline with a prior
text              the text tower whose states the U-Net sees (OpenCLIP ViT-H/14)
latent            the U-Net. Its `augmentation` is the schedule of the noise on z_i, and its `embedding_space`
                  the mean and deviation with which z_i is whitened for it
autoencoder       Stable Diffusion's
prior_diffusion   Karlo's, in the folder of the pipeline that draws from captions

The published folders `stable-diffusion-2-1-unclip` (h: OpenCLIP ViT-H/14, 1024) and `-small` (l: CLIP
ViT-L/14, 768) vary images. Karlo's prior draws embeddings of ViT-L/14 and stands in front of the latter.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part, no_part
from unclip_jax.checkpoint.files import Place, finite, keep, open_weights, read_json
from unclip_jax.checkpoint.providers import (
    clip,
    karlo,
    preprocess,
    stable_diffusion,
    stable_diffusion_config,
    stable_unclip_config,
)
from unclip_jax.checkpoint.providers.stable_unclip_config import CLASSES, DRAWS, SAMPLING
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.errors import InputError
from unclip_jax.sharding import path_name


def recognises(path: Path) -> bool:
    """Whether a folder is one of StableUnCLIP's pipelines."""
    index = path / "model_index.json"
    return index.is_file() and read_json(index).get("_class_name") in CLASSES


def read(path: Path, only: str | None, place: Place) -> Bundle:
    """Reads a folder as a bundle; see `providers.Provider`. The U-Net and the prior hold the hashes of the
    parts under them, so these are read even when `only` names another part."""
    makers, sampling = _plan(path, place)
    if only is not None and only not in makers:
        raise no_part(path, only, makers)
    parts = {name: make() for name, make in makers.items() if only in (None, name)}
    return Bundle(parts, "stable_unclip", sampling, {"source": str(path)}, str(path))


def _plan(path: Path, place: Place) -> tuple[dict[str, Callable[[], Part]], dict]:
    # A function that makes each part, and the sampling defaults. It checks all configurations and reads no
    # weights.
    index = read_json(path / "model_index.json")
    draws = index["_class_name"] == DRAWS
    stable_diffusion_config.check_index(
        index, str(path / "model_index.json"), CLASSES[index["_class_name"]], aside=()
    )
    makers, sampling = {}, {}
    makers["clip"], model = _clip(path, draws, place)
    clip_part = makers["clip"]
    shared, sampling["latent"] = stable_diffusion.folder_parts(path, place, "text")
    sampling["latent"] |= SAMPLING
    makers |= shared | {"latent": _conditioned(path, shared["latent"], clip_part, model["embed_dim"])}
    if draws:
        config = read_json(path / "prior_scheduler" / "scheduler_config.json")
        diffusion, sampling["prior_diffusion"] = stable_unclip_config.prior_scheduler(
            config, "prior_scheduler"
        )
        frozen = lambda: {"clip": clip_part().hash}
        makers["prior_diffusion"] = karlo.prior_maker(path, model, diffusion, frozen, place)
    return makers, sampling


def _clip(path: Path, draws: bool, place: Place) -> tuple[Callable[[], Part], dict]:
    # The CLIP of z_i: its text tower where there is a prior, and its image tower where there is none.
    folder = path / ("prior_text_encoder" if draws else "image_encoder")
    config, tokenizer = read_json(folder / "config.json"), {}
    model = clip.two_halves(config, None) if draws else clip.two_halves(None, config)
    if draws:
        length = model["text"]["length"]
        tokenizer = {"tokenizer": ClipTokenizer.from_folder(path / "prior_tokenizer", length).config()}
    else:
        side = model["image"]["image_size"]
        model["image"] |= preprocess.of_transformers(path / "feature_extractor", side, required=True)

    @functools.cache
    def make() -> Part:
        params = clip.read_halves(model, {"text": folder, "image": folder}, keep)
        placed = jax.tree_util.tree_map_with_path(lambda where, value: place(path_name(where), value), params)
        return Part({"kind": "clip", "model": model} | tokenizer, placed, params_hash(params))

    return make, model


def _conditioned(
    path: Path, unet: Callable[[], Part], clip_part: Callable[[], Part], dim: int
) -> Callable[[], Part]:
    # The U-Net with what it needs to see z_i.
    vector = stable_diffusion_config.unet_model(read_json(path / "unet" / "config.json"), "the U-Net").get(
        "vector_dim"
    )
    if vector != 2 * dim:
        raise InputError(
            f"the U-Net takes a vector of {vector}, and an embedding of {dim} with its noise level is "
            f"{2 * dim}: they are of different CLIPs"
        )
    whitened = stable_unclip_config.normalizer_dim(
        read_json(path / "image_normalizer" / "config.json"), "image_normalizer"
    )
    if whitened != dim:
        raise InputError(f"image_normalizer whitens embeddings of {whitened}, and CLIP makes {dim}")
    config = read_json(path / "image_noising_scheduler" / "scheduler_config.json")
    augmentation = stable_unclip_config.augmentation(config, "image_noising_scheduler")

    def make() -> Part:
        weights, part = open_weights(path / "image_normalizer"), unet()
        found = {}
        for name in ("mean", "std"):
            if name not in weights or weights.shape(name) not in ((1, dim), (dim,)):
                raise InputError(f"image_normalizer's file lacks {name} of {dim} numbers")
            values = np.asarray(weights[name], np.float32).reshape(-1)
            found[name] = finite(values, name, "image_normalizer").tolist()
        if min(found["std"]) <= 0:
            raise InputError("image_normalizer's std must be positive")
        config = part.config | {
            "augmentation": augmentation,
            "embedding_space": {"kind": "whitened", "scale": None, **found},
            "frozen": part.config["frozen"] | {"clip": clip_part().hash},
        }
        return dataclasses.replace(part, config=config)

    return make
