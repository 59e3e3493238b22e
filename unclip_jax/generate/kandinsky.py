"""Latents from image embeddings with Kandinsky's decoder (Razzhigaev et al. 2023).

Guidance compares z_i with another embedding: that of an image without content, or one that the prior draws
for a negative caption. The image without content is zero in all channels after CLIP's normalisation: it has
the mean colour.

The decoder that inpaints sees the latents of the known part and where it is known. As in diffusers' pipeline,
the known part of the sample is replaced at every step by the image's own latents, noised with the noise that
sampling started from. The known part is one latent smaller than the mask says, so that none of its latents
has seen the unknown part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.guidance import Denoised, abar_at
from unclip_jax.diffusion.process import add_noise, fold_in, standard_normal
from unclip_jax.diffusion.samplers import repaint
from unclip_jax.errors import InputError
from unclip_jax.generate.denoise import NOISE, STEPS, Start, diffusion_sampler
from unclip_jax.generate.latents import latent_denoiser, mean_latents, sample_latents
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import SamplingOptions
from unclip_jax.models.clip import MEAN

# A latent is unknown where one of these neighbours is (row, column): the six of diffusers' pipeline.
NEIGHBOURS = ((-1, -1), (-1, 0), (0, -1), (0, 1), (1, 0), (1, 1))


class KnownLatents(NamedTuple):
    """The part of images that inpainting keeps.

    latents: (B, h, w, Z) scaled latents of the whole images.
    mask: (B, h, w, 1) bool, True where they are kept.
    """

    latents: jax.Array
    mask: jax.Array

    @property
    def beside(self) -> jax.Array:
        """(B, h, w, Z + 1) what the decoder sees of it beside the noised latents."""
        known = jnp.where(self.mask, self.latents, 0)
        return jnp.concatenate([known, self.mask.astype(known.dtype)], axis=-1)


def blank_image(clip_config: Mapping[str, Any]) -> np.ndarray:
    """An image without content (module docstring), (1, S, S, 3) float32 in [-1, 1].

    clip_config: the configuration of the part of kind `clip`.

    Raises:
      ValueError: when the CLIP has no image encoder.
    """
    tower = clip_config["model"]["image"]
    if tower is None:
        raise InputError(
            "the CLIP has no image encoder, which guidance needs to embed an image without content"
        )
    side = tower["image_size"]
    return np.broadcast_to(2 * np.float32(tower.get("mean", MEAN)) - 1, (1, side, side, 3))


def blank_embed(clip: Network) -> jax.Array:
    """The embedding (1, D) of an image without content. Raises a ValueError as `blank_image`."""
    return clip.apply(jnp.asarray(blank_image(clip.config)), method="encode_image")


def known_latents(autoencoder: Network, image: jax.Array, known: jax.Array) -> KnownLatents:
    """What inpainting keeps of images.

    Args:
      autoencoder: of kind `vq_autoencoder` or `kl_autoencoder`.
      image: (B, H, W, 3) in [-1, 1].
      known: (B, H, W, 1) bool, True where the image is kept.
    """
    factor = autoencoder.module.factor
    mask = known[:, ::factor, ::factor]
    h, w = mask.shape[1:3]
    edged = jnp.pad(mask, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=True)
    for row, column in NEIGHBOURS:
        mask = mask & edged[:, 1 + row : 1 + row + h, 1 + column : 1 + column + w]
    return KnownLatents(mean_latents(autoencoder, image), mask)


def sample_decoder_latents(
    latent: Network,
    z_image: jax.Array,
    other: jax.Array,
    size: tuple[int, int],
    rng: jax.Array,
    options: SamplingOptions,
    *,
    x_T: jax.Array | None = None,
    known: KnownLatents | None = None,
    start: Start | None = None,
) -> jax.Array:
    """Draws latents for image embeddings.

    Args:
      latent: of kind `kandinsky`.
      z_image: (B, D) raw image embeddings.
      other: (B, D) or (1, D), what guidance compares them with.
      size: (h, w) of the latents.
      rng: one key, or (B,) keys, one per row.
      options: steps, guidance, clipping, sampler.
      x_T: (B, h, w, Z) the noise to start from; drawn when None.
      known: the part to keep, for a decoder that inpaints.
      start: scaled latents (B, h, w, Z) to start from in place of noise, for a decoder that does not inpaint;
        x_T is then what they are noised with.

    Returns:
      (B, h, w, Z) float32, scaled as in training; equal to the known latents where they are known.

    Raises:
      ValueError: when a decoder that inpaints gets no `known`, or a decoder that does not inpaint gets one.
    """
    if latent.module.inpaint != (known is not None):
        raise InputError(
            "a decoder that inpaints needs the known part of the image, and another one cannot use it"
        )
    inputs, rows = {"image_embed": (z_image, other)}, len(z_image)
    if known is None:
        return sample_latents(
            latent, None, size, rng, options, x_T=x_T, inputs=inputs, rows=rows, start=start
        )
    image, mask = known
    if x_T is None:
        x_T = standard_normal(fold_in(rng, NOISE), image.shape)
    denoise = latent_denoiser(latent, None, size, options, rows, known.beside, inputs)
    sampler = diffusion_sampler(latent.config, options)

    def with_known(x: jax.Array, t: jax.Array) -> Denoised:
        noised = add_noise(image, x_T, abar_at(sampler.schedule, jnp.asarray(t), x.dtype))
        return denoise(jnp.where(mask & (t < sampler.steps[0]), noised, x), t)

    return jnp.where(mask, image, sampler.run(with_known, x_T, rng))


def repaint_decoder_latents(
    latent: Network,
    z_image: jax.Array,
    other: jax.Array,
    rng: jax.Array,
    options: SamplingOptions,
    known: KnownLatents,
    resamples: int,
) -> jax.Array:
    """Draws the unknown latents of images with a decoder that was not trained to inpaint
    (`samplers.repaint`).

    Args:
      latent, z_image, other, rng, known: as in `sample_decoder_latents`.
      options: steps, guidance and clip; the sampler is ancestral with the posterior's variance.
      resamples: passes per step, at least 1.

    Returns:
      (B, h, w, Z) float32; equal to the known latents where they are known.
    """
    image, inputs = known.latents, {"image_embed": (z_image, other)}
    sampler = diffusion_sampler(latent.config, options)
    denoise = latent_denoiser(latent, None, image.shape[1:3], options, len(image), None, inputs)
    x = standard_normal(fold_in(rng, NOISE), image.shape)
    return repaint(
        denoise, x, sampler.schedule, sampler.steps, fold_in(rng, STEPS),
        image=image, known=known.mask, resamples=resamples,
    )  # fmt: skip
