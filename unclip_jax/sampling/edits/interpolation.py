"""Interpolation between two images (unCLIP section 3.2)."""

from __future__ import annotations

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.errors import InputError
from unclip_jax.sampling.edits import inversion
from unclip_jax.sampling.edits.coders import coder_of
from unclip_jax.sampling.edits.inversion import Latents, slerp
from unclip_jax.sampling.programs import Progress, Sampler, as_sampler

NOISES = ("slerp", "fixed")


def interpolate(
    bundle: Sampler | Bundle,
    first: np.ndarray,
    second: np.ndarray,
    *,
    count: int = 8,
    noise: str = "slerp",
    steps: int | str | tuple[int, ...] = inversion.STEPS,
    guidance_scale: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> np.ndarray:
    """Draws images between two images: slerp turns z_i from the first image's to the second image's.

    Args:
      bundle: of a system with image embeddings (`coders.CODERS`).
      first, second: uint8 (H, W, 3), any sizes.
      count: number of images, including the two ends; at least 2.
      noise: how to choose x_T. `slerp` turns it as well, so that the ends are the two images. `fixed` uses
        one random x_T for all images (the paper's second method).
      steps, guidance_scale: for both inversion and decoding.
      seed: random seed of the fixed noise and of the upsamplers.
      progress: called with (images done, total images).

    Returns:
      uint8 (count, H, W, 3).

    Raises:
      ValueError: if an input is not an image, or an option is out of range.
      KeyError: if the bundle lacks a part.
    """
    if count < 2:
        raise InputError(f"an interpolation needs at least 2 images, got {count}")
    if noise not in NOISES:
        raise InputError(f"unknown noise {noise!r}; choose one of {', '.join(NOISES)}")
    sampler, shared = as_sampler(bundle), {"steps": steps, "guidance_scale": guidance_scale}
    coder = coder_of(sampler)
    coder.check_edit(sampler, seed=seed, **shared)
    latents = between(coder.encode(sampler, [first, second], **shared), count, noise, seed)
    positions = np.zeros(count, int)
    drawn = coder.decode(sampler, latents, seed=seed, positions=positions, progress=progress, **shared)
    return ops.to_uint8(drawn[-1])


def between(ends: Latents, count: int, noise: str = "slerp", seed: int = 0) -> Latents:
    """The latents of `count` images on the way between two; the arguments are those of `interpolate`.

    ends: the latents of both images (two rows).
    """
    theta = np.linspace(0, 1, count)

    def turn(rows: np.ndarray) -> np.ndarray:
        return slerp(np.repeat(rows[:1], count, axis=0), np.repeat(rows[1:], count, axis=0), theta)

    x_T = turn(ends.x_T) if noise == "slerp" else inversion.one_noise(ends.x_T.shape[1:], count, seed)
    return Latents(turn(ends.z_image), x_T)
