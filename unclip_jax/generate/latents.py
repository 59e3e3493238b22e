"""Latents from captions, and images from latents (Rombach et al. 2022, section 3).

Guidance runs both halves as one batch of 2 B rows. The keys and values of the captions are computed once for
all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.guidance import Denoise
from unclip_jax.diffusion.process import fold_in, standard_normal
from unclip_jax.diffusion.samplers import ddim_invert
from unclip_jax.errors import InputError
from unclip_jax.generate.denoise import NOISE, Start, diffusion_sampler
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import SamplingOptions, is_guided
from unclip_jax.generate.text import Texts, twice
from unclip_jax.models.autoencoder import Moments, sample_moments

OVERLAP = 4  # a tile's overlap with the next one is its side divided by this
# Inputs of a U-Net by name: B rows, and the B rows or the one row that stand for them in the unconditional
# half of guidance.
Inputs = Mapping[str, tuple[jax.Array, jax.Array]]


def latent_denoiser(
    latent: Network,
    texts: Texts | None,
    size: tuple[int, int],
    options: SamplingOptions,
    rows: int,
    beside: jax.Array | None = None,
    inputs: Inputs | None = None,
) -> Denoise:
    """The guided denoiser of a latent U-Net.

    Args:
      latent: of kind `latent`.
      texts: B captions, and the empty or the negative one; None for a U-Net without condition.
      size: (h, w) of the latents.
      options: guidance and clipping. A U-Net without condition is not guided.
      rows: B.
      beside: (B, h, w, E) what the U-Net sees beside the latents, in its last input channels; None for
        nothing.
      inputs: the network's other inputs by name, each for both halves of guidance; None for no others.
    """
    inputs = inputs or {}
    guided = (texts is not None or bool(inputs)) and is_guided(options)
    given = {} if texts is None else {"context": (texts.both() if guided else texts.captions).states}
    for name, (cond, uncond) in inputs.items():
        uncond = jnp.broadcast_to(uncond, cond.shape)
        given[name] = jnp.concatenate([cond, uncond]) if guided else cond
    beside = None if beside is None else twice(beside, guided)
    variables = {"params": latent.params}

    def run(x: jax.Array, t: jax.Array, kept: dict, **settings):
        x = x if beside is None else jnp.concatenate([x, beside], axis=-1)
        return latent.module.apply(variables | kept, x, t, **given, **settings)

    rows, channels = (2 if guided else 1) * rows, latent.module.out_channels
    # This call's only used result is the collection, so XLA removes its U-Net.
    _, fixed = run(jnp.zeros((rows, *size, channels)), jnp.zeros(rows), {}, mutable=["fixed"])
    sampler = diffusion_sampler(latent.config, options)
    return sampler.denoiser(lambda x, t: run(x, t, fixed), guided)


def sample_latents(
    latent: Network,
    texts: Texts | None,
    size: tuple[int, int],
    rng: jax.Array,
    options: SamplingOptions,
    *,
    x_T: jax.Array | None = None,
    beside: jax.Array | None = None,
    inputs: Inputs | None = None,
    rows: int | None = None,
    start: Start | None = None,
) -> jax.Array:
    """Draws latents for captions.

    Args:
      latent, texts, size, options, beside, inputs: as in `latent_denoiser`.
      rng: one key, or (B,) keys, one per row.
      x_T: (B, h, w, Z) the noise to start from; drawn when None.
      rows: B, which a U-Net without condition needs.
      start: scaled latents (B, h, w, Z) to start from in place of noise; x_T is then what they are noised
        with.

    Returns:
      (B, h, w, Z) float32, scaled as in training.
    """
    rows = rows if texts is None else texts.rows
    denoise = latent_denoiser(latent, texts, size, options, rows, beside, inputs)
    shape = (rows, *size, latent.module.out_channels)
    noise = standard_normal(fold_in(rng, NOISE), shape) if x_T is None else x_T
    sampler, x = diffusion_sampler(latent.config, options).begin(noise, start)
    return sampler.run(denoise, x, rng)


def encode_latents(autoencoder: Network, batch: Mapping[str, jax.Array], rng: jax.Array) -> jax.Array:
    """Scaled latents of a batch's images: drawn from a KL autoencoder's Gaussian, or a VQ one's before its
    codebook.

    Args:
      autoencoder: of kind `kl_autoencoder` or `vq_autoencoder`.
      batch: with `image` (B, H, W, 3) in [-1, 1], or with `latents` (B, h, w, Z), not scaled.
      rng: one key, or (B,) keys, one per row.

    Returns:
      (B, h, w, Z) float32.
    """
    if "latents" in batch:
        latents = batch["latents"]
    else:
        latents = autoencoder.apply(batch["image"], method="encode")
        if isinstance(latents, Moments):
            latents = sample_moments(latents, standard_normal(rng, latents.mean.shape))
    return latents.astype(jnp.float32) * autoencoder.config["scale_factor"]


def mean_latents(autoencoder: Network, image: jax.Array) -> jax.Array:
    """Scaled latents of images, without the noise of a KL autoencoder's Gaussian.

    image: (B, H, W, 3) in [-1, 1] -> (B, h, w, Z) float32.
    """
    latents = autoencoder.apply(image, method="encode")
    latents = latents.mean if isinstance(latents, Moments) else latents
    return latents.astype(jnp.float32) * autoencoder.config["scale_factor"]


def invert_latents(
    latent: Network,
    texts: Texts | None,
    z: jax.Array,
    options: SamplingOptions,
    inputs: Inputs | None = None,
) -> jax.Array:
    """The noise x_T from which DDIM with the same options at eta 0 draws latents again.

    Args:
      latent, texts, inputs: as in `latent_denoiser`.
      z: (B, h, w, Z) scaled latents.
      options: as in `sample_latents`. Inversion never clips x0, so `clip` must be None.

    Returns:
      (B, h, w, Z) float32.

    Raises:
      ValueError: when the options clip.
    """
    if options.clip is not None:
        raise InputError("DDIM inversion needs clip None: what clipping cuts off cannot be found again")
    sampler = diffusion_sampler(latent.config, options)
    denoise = latent_denoiser(latent, texts, z.shape[1:3], options, len(z), inputs=inputs)
    return ddim_invert(denoise, z, sampler.schedule, sampler.moves)


def inpainting_inputs(autoencoder: Network, image: jax.Array, known: jax.Array) -> jax.Array:
    """What an inpainting U-Net sees beside the latents (Stable Diffusion): the mask, 1 where the image is
    drawn anew, and the scaled latents (the mean) of the image, grey there.

    Args:
      image: (B, H, W, 3) in [-1, 1].
      known: (B, H, W, 1) bool, True where the image is kept.

    Returns:
      (B, h, w, 1 + Z) float32.
    """
    factor = autoencoder.module.factor
    masked = mean_latents(autoencoder, jnp.where(known, image, 0.0))
    drawn = jnp.logical_not(known)[:, ::factor, ::factor].astype(jnp.float32)
    return jnp.concatenate([drawn, masked], axis=-1)


def decode_latents(
    autoencoder: Network, z: jax.Array, tile: int | None = None, method: str = "decode"
) -> jax.Array:
    """Images from scaled latents.

    Args:
      autoencoder: of kind `kl_autoencoder` or `vq_autoencoder`.
      z: (B, h, w, Z) scaled latents.
      tile: side of the tiles in latents, or None for the whole picture at once (`decode_tiled`).
      method: of the autoencoder; `decode_quantised` takes the latents of a VQ autoencoder as they are.

    Returns:
      (B, H, W, 3) float32 in [-1, 1].
    """

    def decode(z: jax.Array) -> jax.Array:
        return autoencoder.apply(z, method=method)

    z = z / autoencoder.config["scale_factor"]
    image = decode(z) if tile is None else decode_tiled(decode, z, tile, autoencoder.module.factor)
    return jnp.clip(image, -1, 1)


def decode_tiled(decode: Callable[[jax.Array], jax.Array], z: jax.Array, tile: int, factor: int) -> jax.Array:
    """Decodes overlapping tiles one at a time, so that memory does not grow with the picture, and blends
    them.

    Where a tile is alone and its pixels do not see its edges, the result is that of the whole picture, for a
    decoder that sees a neighbourhood only. The attention and the norms of an autoencoder see the whole tile,
    so tiles of it differ a little in colour, which the blending hides.

    Args:
      decode: (B, tile, tile, Z) -> (B, tile * factor, tile * factor, C).
      z: (B, h, w, Z) latents.
      tile: side of a tile in latents.
      factor: side of the image / side of the latents.

    Returns:
      (B, h * factor, w * factor, C).
    """
    b, h, w, _ = z.shape
    if h <= tile and w <= tile:
        return decode(z)
    sides = min(tile, h), min(tile, w)
    overlap = max(tile // OVERLAP, 1)
    rows, columns = (_starts(n, side, overlap) for n, side in zip((h, w), sides))
    corners = jnp.asarray([(row, column) for row in rows for column in columns])
    # A tile's weight falls from 1 to 0 over the overlap, so that the weights of two neighbours add up to 1.
    ramps = []
    for side in sides:
        edge = (np.minimum(np.arange(side * factor), np.arange(side * factor)[::-1]) + 0.5) / (
            overlap * factor
        )
        ramps.append(np.minimum(edge, 1.0))
    weight = jnp.asarray(ramps[0][:, None] * ramps[1][None], jnp.float32)[None, :, :, None]

    def add(i: int, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        row, column = corners[i]
        image, weights = sums
        drawn = decode(jax.lax.dynamic_slice(z, (0, row, column, 0), (b, *sides, z.shape[-1])))
        at = (0, row * factor, column * factor, 0)
        old = jax.lax.dynamic_slice(image, at, drawn.shape)
        image = jax.lax.dynamic_update_slice(image, old + weight * drawn, at)
        old = jax.lax.dynamic_slice(weights, at, weight.shape)
        return image, jax.lax.dynamic_update_slice(weights, old + weight, at)

    channels = jax.eval_shape(decode, jax.ShapeDtypeStruct((b, *sides, z.shape[-1]), z.dtype)).shape[-1]
    size = (h * factor, w * factor)
    sums = jnp.zeros((b, *size, channels)), jnp.zeros((1, *size, 1))
    image, weights = jax.lax.fori_loop(0, len(corners), add, sums)
    return image / weights


def _starts(length: int, side: int, overlap: int) -> list[int]:
    # Where the tiles begin along an axis; the last one ends with the picture.
    count = -(-(length - overlap) // (side - overlap)) if length > side else 1
    return [min(i * (side - overlap), length - side) for i in range(max(count, 1))]
