"""Interpolation between two images (unCLIP section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.sampling import latents
from unclip_jax.sampling.latents import slerp

NOISES = ("slerp", "fixed")


def interpolate(
    bundle: Bundle,
    first: np.ndarray,
    second: np.ndarray,
    *,
    count: int = 8,
    noise: str = "slerp",
    steps: int | str | tuple[int, ...] = latents.STEPS,
    guidance_scale: float = 1.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Draws the way from one image to another: z_i turns from the first's to the second's by slerp.

    Args:
      bundle: with clip and decoder.
      first, second: uint8 (H, W, 3), any sizes.
      count: images, the two ends included; at least 2.
      noise: `slerp`: x_T turns as well, so that the ends are the two images; `fixed`: one random x_T throughout (the paper's second way).
      steps, guidance_scale: of inversion and decoding.
      seed: of the fixed noise and of the upsamplers.
      progress: called with (images done, images in all).

    Returns:
      uint8 (count, H, W, 3).

    Raises:
      ValueError: on what is not an image, or options out of range; KeyError when the bundle lacks a part.
    """
    if count < 2:
        raise ValueError(f"an interpolation needs at least 2 images, got {count}")
    if noise not in NOISES:
        raise ValueError(f"unknown noise {noise!r}; choose one of {', '.join(NOISES)}")
    code = latents.encode(bundle, [first, second], steps=steps, guidance_scale=guidance_scale)
    theta = np.linspace(0, 1, count)
    ends = lambda a: (np.repeat(a[:1], count, 0), np.repeat(a[1:], count, 0))  # noqa: E731
    x_T = slerp(*ends(code.x_T), theta) if noise == "slerp" else latents.one_noise(code.x_T.shape[1:], count, seed)
    drawn = latents.decode(
        bundle, slerp(*ends(code.z_image), theta), x_T, steps=steps, guidance_scale=guidance_scale, seed=seed,
        positions=np.zeros(count, int), progress=progress,
    )[-1]  # fmt: skip
    return ops.to_uint8(drawn)
