"""Variations of an image, which share its z_i.

`variations` decodes with DDIM noise (unCLIP section 3.1). `fresh_variations` starts from fresh noise (Karlo).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.errors import InputError
from unclip_jax.sampling.edits import inversion
from unclip_jax.sampling.edits.coders import coder_of
from unclip_jax.sampling.programs import Progress, Sampler, as_sampler, as_seed


def variations(
    bundle: Sampler | Bundle,
    images: Sequence[np.ndarray] | np.ndarray,
    *,
    count: int = 8,
    eta: float = 1.0,
    steps: int | str | tuple[int, ...] = inversion.STEPS,
    guidance_scale: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> np.ndarray:
    """Draws images with the same CLIP embedding as the given ones.

    Args:
      bundle: of a system with image embeddings (`coders.CODERS`).
      images: uint8 (H, W, 3), any sizes.
      count: variations per image.
      eta: noise of DDIM, in [0, 1]. 0 reconstructs the image; larger values change it more.
      steps, guidance_scale: for both inversion and decoding.
      seed: whole number below 2**32.
      progress: called with (images done, total images).

    Returns:
      uint8 (N, count, H, W, 3).

    Raises:
      ValueError: if an input is not an image, or an option is out of range.
      KeyError: if the bundle lacks a part.
    """
    if count < 1:
        raise InputError(f"the number of variations must be at least 1, got {count}")
    sampler, shared = as_sampler(bundle), {"steps": steps, "guidance_scale": guidance_scale}
    coder = coder_of(sampler)
    coder.check_edit(sampler, eta=eta, seed=seed, **shared)
    latents = coder.encode(sampler, images, **shared)
    repeated = inversion.Latents(*(np.repeat(a, count, axis=0) for a in latents))
    drawn = coder.decode(sampler, repeated, eta=eta, seed=seed, progress=progress, **shared)[-1]
    return ops.to_uint8(drawn).reshape(len(latents.z_image), count, *drawn.shape[1:])


def fresh_variations(
    bundle: Sampler | Bundle,
    images: Sequence[np.ndarray] | np.ndarray,
    *,
    count: int = 8,
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Draws images from z_i and fresh noise, with the bundle's own sampler.

    The results keep only what CLIP's embedding holds of the images.

    Args:
      bundle, images, count, seed, progress: as in `variations`.
      options: overrides of the bundle's sampling defaults per part.

    Returns:
      uint8 (N, count, H, W, 3).

    Raises:
      ValueError, KeyError: as in `variations`.
    """
    if count < 1:
        raise InputError(f"the number of variations must be at least 1, got {count}")
    sampler = as_sampler(bundle)
    coder = coder_of(sampler)
    sampler.network("clip"), coder.noise_shape(sampler), as_seed(seed), sampler.options(options)
    z_image = np.repeat(inversion.embed_images(sampler, images), count, axis=0)
    stages = coder.sample(
        sampler, [""] * len(z_image), z_image=z_image, seed=seed, options=options, progress=progress
    )
    return ops.to_uint8(stages.images[-1]).reshape(-1, count, *stages.images[-1].shape[1:])
