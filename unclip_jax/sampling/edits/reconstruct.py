"""Reconstructions from the first principal components of z_i (unCLIP section 4, figure 7)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.errors import InputError
from unclip_jax.models.codec import Codec, project, unproject
from unclip_jax.sampling.edits import inversion
from unclip_jax.sampling.edits.coders import coder_of
from unclip_jax.sampling.edits.inversion import Latents
from unclip_jax.sampling.programs import Progress, Sampler, as_sampler

DIMS = (20, 30, 40, 80, 120, 160, 200, 320)  # the paper's, of 1,024


def check_dims(dims: int, most: int) -> None:
    """Raises a ValueError unless a number of principal components is in [1, most]."""
    if not 1 <= dims <= most:
        raise InputError(f"the number of principal components must be between 1 and {most}, got {dims}")


def truncate(bundle: Bundle, z_image: np.ndarray, dims: int) -> np.ndarray:
    """Reduces raw embeddings to their first `dims` principal components.

    Args:
      bundle: with the part codec.
      z_image: (N, D) raw embeddings.
      dims: number of components, in [1, D]. All D components reproduce the embeddings.

    Returns:
      (N, D) raw embeddings.

    Raises:
      ValueError: if dims is not in [1, D].
      KeyError: if the bundle has no part `codec`.
    """
    codec = Codec(**bundle.part("codec").params)
    most = codec.mean.shape[0]
    check_dims(dims, most)
    return np.asarray(unproject(codec, project(codec, z_image, dims)))


def reconstruct(
    bundle: Sampler | Bundle,
    image: np.ndarray,
    *,
    dims: Sequence[int] | None = None,
    steps: int | str | tuple[int, ...] = inversion.STEPS,
    guidance_scale: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Draws an image from more and more principal components of its z_i, always from the same noise.

    Args:
      bundle: with the part codec, of a system with image embeddings (`coders.CODERS`).
      image: uint8 (H, W, 3).
      dims: numbers of components. None means those of the paper that are below D, and D.
      steps, guidance_scale: options of the decoder.
      seed: random seed of the noise and of the upsamplers.
      progress: called with (images done, total images).

    Returns:
      uint8 (len(dims), H, W, 3), and the dims.

    Raises:
      ValueError: if an input is not an image, or an option is out of range.
      KeyError: if the bundle lacks a part.
    """
    sampler = as_sampler(bundle)
    most, coder = sampler.network("codec").config["embed_dim"], coder_of(sampler)
    chosen = tuple(dims) if dims is not None else (*(d for d in DIMS if d < most), most)
    if not chosen:
        raise InputError("no numbers of principal components: give at least one")
    coder.check_edit(sampler, steps, guidance_scale, seed=seed)
    for number in chosen:
        check_dims(number, most)
    z_image = inversion.embed_images(sampler, [image])
    latents = components(sampler.bundle, z_image, chosen, coder.noise_shape(sampler), seed)
    drawn = coder.decode(
        sampler, latents, steps=steps, guidance_scale=guidance_scale, seed=seed,
        positions=np.zeros(len(chosen), int), progress=progress,
    )[-1]  # fmt: skip
    return ops.to_uint8(drawn), chosen


def components(
    bundle: Bundle, z_image: np.ndarray, dims: Sequence[int], shape: tuple[int, int, int], seed: int
) -> Latents:
    """The latents of one image, reduced to each of `dims` principal components, with one noise for all.

    Args:
      bundle: with the part codec.
      z_image: (1, D), raw.
      dims: numbers of components.
      shape: (h, w, C) of x_T.
      seed: of the noise.
    """
    rows = [truncate(bundle, z_image, number) for number in dims]
    return Latents(np.concatenate(rows), inversion.one_noise(shape, len(dims), seed))
