"""Variations of an image: the same z_i, decoded with DDIM noise (unCLIP section 3.1), or from noise of their own (Karlo)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.sampling import latents
from unclip_jax.sampling.text_to_image import sample_stages


def variations(
    bundle: Bundle,
    images: Sequence[np.ndarray] | np.ndarray,
    *,
    count: int = 8,
    eta: float = 1.0,
    steps: int | str | tuple[int, ...] = latents.STEPS,
    guidance_scale: float = 1.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
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
        raise ValueError(f"the number of variations must be at least 1, got {count}")
    code = latents.encode(bundle, images, steps=steps, guidance_scale=guidance_scale)
    z_image, x_T = (np.repeat(a, count, axis=0) for a in code)
    drawn = latents.decode(bundle, z_image, x_T, steps=steps, eta=eta, guidance_scale=guidance_scale, seed=seed, progress=progress)[-1]
    return ops.to_uint8(drawn).reshape(len(code.z_image), count, *drawn.shape[1:])


def fresh_variations(
    bundle: Bundle,
    images: Sequence[np.ndarray] | np.ndarray,
    *,
    count: int = 8,
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
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
        raise ValueError(f"the number of variations must be at least 1, got {count}")
    z_image = np.repeat(latents.embed_images(bundle, images), count, axis=0)
    stages = sample_stages(bundle, [""] * len(z_image), z_image=z_image, seed=seed, options=options, progress=progress)
    return ops.to_uint8(stages.images[-1]).reshape(-1, count, *stages.images[-1].shape[1:])
