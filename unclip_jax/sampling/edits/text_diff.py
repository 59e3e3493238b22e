"""Text diffs: an image changed in the direction from one caption to another (unCLIP section 3.3)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.sampling import latents
from unclip_jax.sampling.latents import slerp


def text_diff(
    bundle: Bundle,
    image: np.ndarray,
    source: str,
    target: str,
    *,
    count: int = 8,
    max_theta: float = 0.5,
    steps: int | str | tuple[int, ...] = latents.STEPS,
    guidance_scale: float = 1.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Turns z_i towards z_d = norm(z_t(target) - z_t(source)) while x_T stays.

    Args:
      bundle: with clip and decoder.
      image: uint8 (H, W, 3).
      source, target: captions of the image as it is ("" or "a photo" work too) and as it shall be. Text embeddings are taken at unit
        length, as CLIP compares them; the norm of z_i is kept.
      count: images, theta evenly from 0 (the image itself) to `max_theta`; at least 2.
      max_theta: in (0, 1]; the paper uses 0.25 to 0.5.
      steps, guidance_scale: of inversion and decoding.
      seed: of the upsamplers.
      progress: called with (images done, images in all).

    Returns:
      uint8 (count, H, W, 3).

    Raises:
      ValueError: on what is not an image, equal captions, or options out of range; KeyError when the bundle lacks a part.
    """
    if count < 2:
        raise ValueError(f"a text diff needs at least 2 images, got {count}")
    if not 0 < max_theta <= 1:
        raise ValueError(f"max_theta must be in (0, 1], got {max_theta}")
    z_source, z_target = latents.embed_captions(bundle, [source, target])
    direction = z_target / np.linalg.norm(z_target) - z_source / np.linalg.norm(z_source)
    if np.linalg.norm(direction) < 1e-6:
        raise ValueError("the two captions are the same to CLIP: there is no direction between them")
    code = latents.encode(bundle, [image], steps=steps, guidance_scale=guidance_scale)
    direction *= np.linalg.norm(code.z_image) / np.linalg.norm(direction)
    repeat = lambda a: np.repeat(a, count, axis=0)  # noqa: E731
    z_image = slerp(repeat(code.z_image), repeat(direction[None]), np.linspace(0, max_theta, count))
    drawn = latents.decode(
        bundle, z_image, repeat(code.x_T), steps=steps, guidance_scale=guidance_scale, seed=seed,
        positions=np.zeros(count, int), progress=progress,
    )[-1]  # fmt: skip
    return ops.to_uint8(drawn)
