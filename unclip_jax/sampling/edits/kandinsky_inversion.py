"""Encodes an image as the pair (z_i, x_T) for Kandinsky, and decodes the pair.

It is `inversion` (unCLIP section 3) in latent space: x_T is the noise from which DDIM draws the autoencoder's
latents of the image, conditioned on its z_i. What the autoencoder loses is lost before. As there, the decoder
runs without clipping and, by default, at guidance scale 1. No caption reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.generate.latents import invert_latents, mean_latents
from unclip_jax.generate.options import LatentSamplingOptions
from unclip_jax.sampling.edits.inversion import STEPS, Latents, embed_images, row_scales, square
from unclip_jax.sampling.kandinsky import PARTS, blank_of, check_draws, sample_stages
from unclip_jax.sampling.latent import exact_ddim, noise_shape
from unclip_jax.sampling.programs import Progress, Sampler, as_sampler, as_seed, split_scales, with_scale


def check_edit(
    sampler: Sampler, steps: Any, guidance_scale: float, *, eta: float = 0.0, seed: int = 0
) -> LatentSamplingOptions:
    """The decoder's options to invert and decode with; see `inversion.check_edit`."""
    for name in PARTS:
        sampler.bundle.part(name)
    check_draws(sampler.bundle)
    as_seed(seed)
    return sampler.options(exact_ddim(steps, guidance_scale, eta))["latent"]


def encode(
    bundle: Sampler | Bundle,
    images: Sequence[np.ndarray] | np.ndarray,
    *,
    steps: int | str | tuple[int, ...] = STEPS,
    guidance_scale: float | Sequence[float] = 1.0,
    progress: Progress | None = None,
) -> Latents:
    """Finds (z_i, x_T) of images; arguments and errors are those of `inversion.encode`."""
    sampler, count = as_sampler(bundle), len(images)
    chosen = [check_edit(sampler, steps, scale) for scale in row_scales(guidance_scale, count)]
    side = noise_shape(sampler)[0] * sampler.network("autoencoder").module.factor
    pixels = ops.to_float(square(images, side))
    static, scales = split_scales([{"latent": options} for options in chosen])
    z_image, blank = embed_images(sampler, images), blank_of(sampler)

    def make() -> Callable:
        def run(params, scale, blank, image, z_image):
            networks, options = sampler.with_params(params), with_scale(static["latent"], scale)
            latents = mean_latents(networks["autoencoder"], image)
            inputs = {"image_embed": (z_image, blank)}
            return invert_latents(networks["latent"], None, latents, options, inputs)

        return run

    run = sampler.program(("kandinsky_invert", static["latent"]), make)

    def batch(index: np.ndarray) -> jax.Array:
        scale, image, z = sampler.rows((scales["latent"], pixels, z_image), index)
        return run(sampler.params, scale, blank, image, z)

    return Latents(z_image, sampler.in_batches(batch, count, ["latent"], progress))


def decode(
    bundle: Sampler | Bundle,
    latents: Latents,
    *,
    steps: int | str | tuple[int, ...] = STEPS,
    eta: float = 0.0,
    guidance_scale: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
    positions: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """Draws images from (z_i, x_T) with DDIM; arguments and errors are those of `inversion.decode`."""
    count = len(latents.z_image)
    options = [exact_ddim(steps, scale, eta) for scale in row_scales(guidance_scale, count)]
    return sample_stages(
        bundle, [""] * count, seed=seed, z_image=latents.z_image, x_T=latents.x_T, positions=positions,
        options=options, progress=progress,
    ).images  # fmt: skip
