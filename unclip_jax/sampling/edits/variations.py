"""Variations of an image: the same z_i, decoded with DDIM noise (unCLIP section 3.1), or from noise of their own (Karlo)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.errors import InputError
from unclip_jax.sampling.edits import inversion
from unclip_jax.sampling.programs import Progress, Sampler, as_sampler
from unclip_jax.sampling.unclip import sample_stages


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
    """Draws images that share what CLIP sees in the given ones.

    Args:
      bundle: with clip and decoder.
      images: uint8 (H, W, 3), any sizes.
      count: variations per image.
      eta: 0 reconstructs the image; the larger, the more changes; at most 1.
      steps, guidance_scale: of inversion and decoding.
      seed: non-negative integer.
      progress: called with (images done, images in all).

    Returns:
      uint8 (N, count, H, W, 3).

    Raises:
      ValueError: on what is not an image, or options out of range; KeyError when the bundle lacks a part.
    """
    if count < 1:
        raise InputError(f"the number of variations must be at least 1, got {count}")
    sampler, shared = as_sampler(bundle), {"steps": steps, "guidance_scale": guidance_scale}
    found = inversion.encode(sampler, images, **shared)
    repeated = inversion.Latents(*(np.repeat(a, count, axis=0) for a in found))
    drawn = inversion.decode(sampler, repeated, eta=eta, seed=seed, progress=progress, **shared)[-1]
    return ops.to_uint8(drawn).reshape(len(found.z_image), count, *drawn.shape[1:])


def fresh_variations(
    bundle: Sampler | Bundle,
    images: Sequence[np.ndarray] | np.ndarray,
    *,
    count: int = 8,
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Draws what CLIP sees in images from fresh noise, as the bundle samples: nothing else of them is kept.

    Args:
      bundle, images, count, seed, progress: as in `variations`.
      options: overrides of the bundle's sampling defaults per part.

    Returns:
      uint8 (N, count, H, W, 3).

    Raises:
      ValueError, KeyError: as `variations`.
    """
    if count < 1:
        raise InputError(f"the number of variations must be at least 1, got {count}")
    sampler = as_sampler(bundle)
    z_image = np.repeat(inversion.embed_images(sampler, images), count, axis=0)
    stages = sample_stages(
        sampler, [""] * len(z_image), z_image=z_image, seed=seed, options=options, progress=progress
    )
    return ops.to_uint8(stages.images[-1]).reshape(-1, count, *stages.images[-1].shape[1:])
