"""Text diffs: change an image in the direction from one caption to another (unCLIP section 3.3)."""

from __future__ import annotations

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.errors import InputError
from unclip_jax.sampling.edits import inversion
from unclip_jax.sampling.edits.coders import coder_of
from unclip_jax.sampling.edits.inversion import Latents, slerp
from unclip_jax.sampling.programs import Progress, Sampler, as_sampler


def text_diff(
    bundle: Sampler | Bundle,
    image: np.ndarray,
    source: str,
    target: str,
    *,
    count: int = 8,
    max_theta: float = 0.5,
    steps: int | str | tuple[int, ...] = inversion.STEPS,
    guidance_scale: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> np.ndarray:
    """Turns z_i towards z_d = norm(z_t(target) - z_t(source)) while x_T stays.

    Args:
      bundle: of a system with image embeddings (`coders.CODERS`).
      image: uint8 (H, W, 3).
      source: a caption of the image as it is; "" or "a photo" work too.
      target: a caption of the image as it should become. Both text embeddings are scaled to unit length, as
        CLIP compares them. The norm of z_i does not change.
      count: number of images, at least 2. Their theta goes in equal steps from 0 (the image itself) to
        `max_theta`.
      max_theta: in (0, 1]; the paper uses 0.25 to 0.5.
      steps, guidance_scale: for both inversion and decoding.
      seed: random seed of the upsamplers.
      progress: called with (images done, total images).

    Returns:
      uint8 (count, H, W, 3).

    Raises:
      ValueError: if the input is not an image, the captions are equal, or an option is out of range.
      KeyError: if the bundle lacks a part.
    """
    if count < 2:
        raise InputError(f"a text diff needs at least 2 images, got {count}")
    if not 0 < max_theta <= 1:
        raise InputError(f"max_theta must be in (0, 1], got {max_theta}")
    sampler, shared = as_sampler(bundle), {"steps": steps, "guidance_scale": guidance_scale}
    coder = coder_of(sampler)
    coder.check_edit(sampler, seed=seed, **shared)
    direction = direction_between(*inversion.embed_captions(sampler, [source, target]))
    latents = turned(coder.encode(sampler, [image], **shared), direction, count, max_theta)
    positions = np.zeros(count, int)
    drawn = coder.decode(sampler, latents, seed=seed, positions=positions, progress=progress, **shared)[-1]
    return ops.to_uint8(drawn)


def direction_between(z_source: np.ndarray, z_target: np.ndarray) -> np.ndarray:
    """The direction (D,) of unit length from one raw text embedding (D,) to another.

    Raises:
      ValueError: when they are the same.
    """
    direction = z_target / np.linalg.norm(z_target) - z_source / np.linalg.norm(z_source)
    if np.linalg.norm(direction) < 1e-6:
        raise InputError("the two captions are the same to CLIP: there is no direction between them")
    return direction / np.linalg.norm(direction)


def turned(latents: Latents, direction: np.ndarray, count: int, max_theta: float) -> Latents:
    """The latents of `count` images whose z_i turns towards a direction; see `text_diff`.

    latents: of one image. direction: (D,), of unit length.
    """
    direction = direction * np.linalg.norm(latents.z_image)
    z_image, x_T = (np.repeat(a, count, axis=0) for a in latents)
    z_image = slerp(z_image, np.repeat(direction[None], count, axis=0), np.linspace(0, max_theta, count))
    return Latents(z_image, x_T)
