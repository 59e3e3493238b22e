"""Sampling, inversion and inpainting with the decoder (unCLIP sections 2.1 and 3).

Guidance runs the conditional and the unconditional half as one batch of 2B rows. The unconditional half has
the empty caption and the learned null embedding.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from unclip_jax.diffusion.guidance import Denoise, abar_at
from unclip_jax.diffusion.loops import Segment
from unclip_jax.diffusion.process import eps_from_x0, fold_in, standard_normal
from unclip_jax.diffusion.samplers import ddim_invert, repaint
from unclip_jax.errors import InputError
from unclip_jax.generate.clip_guidance import guided_by_clip
from unclip_jax.generate.denoise import NOISE, STEPS, Start, diffusion_sampler
from unclip_jax.generate.networks import Network, image_size, part_schedule
from unclip_jax.generate.options import SamplingOptions, is_guided
from unclip_jax.generate.text import Texts, text_inputs, twice


class Known(NamedTuple):
    """The part of images that inpainting keeps.

    image: (B, H, W, 3) in [-1, 1]. mask: (B, H, W, 1) bool, True where the image is kept.
    """

    image: jax.Array
    mask: jax.Array


def decoder_denoiser(
    decoder: Network,
    z_image: jax.Array | None,
    texts: Texts,
    options: SamplingOptions,
    known: Known | None = None,
) -> Denoise:
    """The decoder as a denoiser of (B, H, W, 3) that already contains conditioning and guidance.

    Args:
      decoder: of kind `decoder`.
      z_image: (B, D) raw image embeddings; None for the learned null embedding.
      texts: the captions and the empty caption.
      options: guidance and clipping.
      known: for a decoder that inpaints. The denoiser's x0 equals the known image where it is known.
    """
    rows, guided = texts.rows, is_guided(options)
    text = texts.both() if guided else texts.captions
    z = jnp.zeros_like(text.embed) if z_image is None else twice(z_image, guided)
    drop = jnp.full(z.shape[0], True) if z_image is None else jnp.arange(z.shape[0]) >= rows
    inputs = {"image_embed": z, "drop_image": drop, **text_inputs(decoder.module, text)}
    if known is not None:
        image, mask = twice(known, guided)
        inputs |= {"known_image": image, "known": mask}
    size = image_size(decoder.config)
    noiseless = jnp.zeros((z.shape[0], size, size, 3)), jnp.zeros(z.shape[0])
    # This call's only used result is the collection, so XLA removes its U-Net.
    _, fixed = decoder.module.apply({"params": decoder.params}, *noiseless, **inputs, mutable=["fixed"])

    def network(x, t):
        return decoder.module.apply({"params": decoder.params, **fixed}, x, t, **inputs)

    denoise = diffusion_sampler(decoder.config, options).denoiser(network, guided)
    return denoise if known is None else keep_known(denoise, known, decoder.config)


def keep_known(denoise: Denoise, known: Known, config: dict) -> Denoise:
    """A denoiser whose x0 equals the known image where it is known. `config` is the part's."""
    schedule = part_schedule(config)

    def with_known(x_t, t):
        predicted = denoise(x_t, t)
        x0 = jnp.where(known.mask, known.image, predicted.x0)
        return predicted._replace(x0=x0, eps=eps_from_x0(x0, x_t, abar_at(schedule, t, x_t.dtype)))

    return with_known


def sample_decoder(
    decoder: Network,
    z_image: jax.Array | None,
    texts: Texts,
    rng: jax.Array,
    options: SamplingOptions,
    *,
    x_T: jax.Array | None = None,
    known: Known | None = None,
    segment: Segment | None = None,
    start: Start | None = None,
    clip: Network | None = None,
) -> jax.Array:
    """Draws images for embeddings (unCLIP section 2.1). A decoder trained to inpaint draws their unknown
    part.

    Args:
      decoder: of kind `decoder`.
      z_image: (B, D) raw image embeddings; None for the null embedding: the caption is then the only
      condition. texts: the captions and the empty caption.
      rng: one key, or (B,) keys, one per row.
      options: steps, guidance, clipping, sampler.
      x_T: (B, H, W, 3) the noise to start from; drawn when None.
      known: the part to keep, for a decoder that inpaints.
      segment: makes some of the steps only (`loops.Segment`). After the last segment the result is the
        sample.
      start: images (B, H, W, 3) in [-1, 1] to start from in place of noise; x_T is then what they are noised
        with.
      clip: the CLIP of the texts, for CLIP guidance.

    Returns:
      (B, H, W, 3) float32 in [-1, 1], H = W = the decoder's image size; equal to the known image where it is
      known.

    Raises:
      ValueError: when a decoder that inpaints gets no `known`, or a decoder that does not inpaint gets one.
    """
    if decoder.module.inpaint != (known is not None):
        raise InputError(
            "a decoder that inpaints needs the known part of the image, and another one cannot use it"
        )
    denoise = decoder_denoiser(decoder, z_image, texts, options, known)
    denoise = guided_by_clip(denoise, clip, texts.captions.embed, decoder.config, options)
    size = image_size(decoder.config)
    noise = standard_normal(fold_in(rng, NOISE), (texts.rows, size, size, 3)) if x_T is None else x_T
    sampler, x = diffusion_sampler(decoder.config, options).begin(noise, start)
    return jnp.clip(sampler.run(denoise, x, rng, segment), -1, 1)


def invert_decoder(
    decoder: Network, image: jax.Array, z_image: jax.Array, texts: Texts, options: SamplingOptions
) -> jax.Array:
    """The noise x_T from which DDIM with the same options at eta 0 draws the image again (unCLIP section 3).

    Args:
      image: (B, H, W, 3) in [-1, 1], of the decoder's size.
      z_image: (B, D) the images' raw embeddings.
      texts, options: as in `sample_decoder`. Inversion never clips x0, so `options.clip` must be None.

    Returns:
      (B, H, W, 3) float32.

    Raises:
      ValueError: when the options clip.
    """
    if options.clip is not None:
        raise InputError("DDIM inversion needs clip None: what clipping cuts off cannot be found again")
    sampler = diffusion_sampler(decoder.config, options)
    return ddim_invert(
        decoder_denoiser(decoder, z_image, texts, options), image, sampler.schedule, sampler.steps
    )


def inpaint_decoder(
    decoder: Network,
    known: Known,
    z_image: jax.Array,
    texts: Texts,
    rng: jax.Array,
    options: SamplingOptions,
    resamples: int,
) -> jax.Array:
    """Draws the unknown part of images with any decoder, also one not trained to inpaint
    (`samplers.repaint`).

    Args:
      known: images of the decoder's size, and the mask of the part to keep.
      z_image, texts, rng: as in `sample_decoder`.
      options: steps, guidance and clip; the sampler is ancestral with the posterior's variance.
      resamples: passes per step, at least 1.

    Returns:
      (B, H, W, 3) float32 in [-1, 1]; equal to the known image where it is known.
    """
    sampler = diffusion_sampler(decoder.config, options)
    denoise = decoder_denoiser(decoder, z_image, texts, options)
    x = standard_normal(fold_in(rng, NOISE), known.image.shape)
    out = repaint(
        denoise, x, sampler.schedule, sampler.steps, fold_in(rng, STEPS),
        image=known.image, known=known.mask, resamples=resamples,
    )  # fmt: skip
    return jnp.clip(out, -1, 1)
