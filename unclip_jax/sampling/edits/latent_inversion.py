"""Encodes an image as the noise x_T from which the latent U-Net draws it for a caption, and decodes it.

DDIM run backwards in the autoencoder's latents gives x_T (Song et al. 2021, section 4.3). There is no image
embedding: the caption takes its place, and a change of the caption with the same x_T changes the picture
(Hertz et al. 2022, section 4, start from it). What the autoencoder loses is lost before.

As in `inversion`, the U-Net runs without clipping and, by default, at guidance scale 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.diffusion.process import fold_in
from unclip_jax.errors import InputError
from unclip_jax.generate.latents import decode_latents, invert_latents, mean_latents, sample_latents
from unclip_jax.sampling.edits.inversion import STEPS, Latents, row_captions, row_scales, square
from unclip_jax.sampling.latent import (
    LATENT,
    Call,
    check_call,
    check_draws,
    check_parts,
    encode_captions,
    flagged,
    noise_shape,
    reads,
)
from unclip_jax.sampling.programs import Progress, Sampler, as_sampler, row_keys, with_scales


def _check(
    sampler: Sampler,
    count: int,
    steps: Any,
    guidance_scale: float | Sequence[float],
    eta: float = 0.0,
    seed: int | Sequence[int] = 0,
    positions: Sequence[int] | None = None,
) -> Call:
    # The call of `count` rows, which differ in their guidance scales at most.
    if reads(sampler.bundle) != "captions":
        raise InputError("inversion in latents needs a U-Net that reads captions")
    check_parts(sampler.bundle)
    check_draws(sampler.bundle)
    shared = {"sampler": "ddim", "eta": eta, "steps": steps, "clip": None, "threshold": None}
    rows = [{"latent": {**shared, "guidance_scale": scale}} for scale in row_scales(guidance_scale, count)]
    return check_call(sampler, "latent", count, seed, positions, rows)


def encode(
    bundle: Sampler | Bundle,
    images: Sequence[np.ndarray] | np.ndarray,
    *,
    steps: int | str | tuple[int, ...] = STEPS,
    guidance_scale: float | Sequence[float] = 1.0,
    captions: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Latents:
    """Finds x_T of images, for their captions.

    Args:
      bundle: with the parts clip, latent and autoencoder.
      images: uint8 (H, W, 3), any sizes; their centred squares count.
      steps: of DDIM, in the bundle's spacing. Twice as many steps halve the error of inverting and decoding.
      guidance_scale: one for all images or one per image. Use the same in `decode`.
      captions: one per image, of the image as it is. None means empty captions.
      progress: called with (images done, total images).

    Returns:
      The latents: x_T (N, h, w, Z). Their z_image is None.

    Raises:
      ValueError: if an input is not an image, or an option is out of range.
      KeyError: if the bundle lacks a part.
    """
    sampler, count = as_sampler(bundle), len(images)
    latent, autoencoder = sampler.network("latent"), sampler.network("autoencoder")
    pixels = ops.to_float(square(images, latent.module.image_size * autoencoder.module.factor))
    call, captions = _check(sampler, count, steps, guidance_scale), row_captions(captions, count)

    def make():
        def run(params, scales, captions, empty, image):
            networks, chosen = sampler.with_params(params), with_scales(call.options, scales)
            texts = encode_captions(networks["clip"], captions, empty)
            z = mean_latents(networks["autoencoder"], image)
            return invert_latents(networks["latent"], texts, z, chosen["latent"])

        return run

    run = sampler.program(("latent_invert", *call.options.items()), make)
    given, empty = (call.scales, sampler.captions(captions)), sampler.captions([""])

    def batch(rows):
        scale, texts = sampler.rows(given, rows)
        return run(sampler.params, scale, texts, empty, sampler.rows(pixels, rows))

    return Latents(None, sampler.in_batches(batch, count, ["latent"], progress))


def decode(
    bundle: Sampler | Bundle,
    latents: Latents,
    *,
    steps: int | str | tuple[int, ...] = STEPS,
    eta: float = 0.0,
    guidance_scale: float | Sequence[float] = 1.0,
    captions: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    theta: float | Sequence[float] = 0.0,
    seed: int | Sequence[int] = 0,
    positions: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """Draws images from x_T with DDIM.

    Args:
      bundle: with the parts clip, latent and autoencoder.
      latents: x_T (N, h, w, Z).
      steps, guidance_scale, captions: as in `encode`.
      eta: noise of DDIM, in [0, 1].
      targets: captions to go to, one per image; None for the captions themselves.
      theta: how far, one for all images or one per image: the U-Net sees (1 - theta) of the captions' text
        states and theta of the targets'.
      seed, positions: of DDIM's noise, as in `inversion.decode`.
      progress: called with (images done, total images).

    Returns:
      [float32 array (N, H, W, 3) in [-1, 1]].

    Raises:
      ValueError: if a shape does not match, or an option is out of range.
      KeyError: if the bundle lacks a part.
    """
    sampler, noise = as_sampler(bundle), np.asarray(latents.x_T, np.float32)
    shape = noise_shape(sampler)
    if noise.shape[1:] != shape or len(noise) == 0:
        raise InputError(f"x_T must be {('N', *shape)}, got {noise.shape}")
    count = len(noise)
    call = _check(sampler, count, steps, guidance_scale, eta, seed, positions)
    captions = row_captions(captions, count)
    targets = captions if targets is None else row_captions(targets, count)

    def make():
        def run(params, scales, captions, targets, theta, empty, x_T, seeds, positions):
            networks, chosen = sampler.with_params(params), with_scales(call.options, scales)
            texts = encode_captions(networks["clip"], captions, empty)
            others = encode_captions(networks["clip"], targets, empty).captions
            share = theta[:, None, None]
            states = (1 - share) * texts.captions.states + share * others.states
            texts = texts._replace(captions=texts.captions._replace(states=states))
            key = fold_in(row_keys(seeds, positions), LATENT)
            z = sample_latents(networks["latent"], texts, shape[:2], key, chosen["latent"], x_T=x_T)
            return z, decode_latents(networks["autoencoder"], z)

        return run

    run = sampler.program(("latent_decode", *call.options.items()), make)
    shares, empty = np.broadcast_to(np.float32(theta), count), sampler.captions([""])
    texts = sampler.captions(captions), sampler.captions(targets)
    given = (call.scales, *texts, shares)

    def batch(rows):
        more = sampler.rows((noise, call.seeds, call.positions), rows)
        return run(sampler.params, *sampler.rows(given, rows), empty, *more)

    image = sampler.in_batches(batch, count, ["latent", "autoencoder"], progress)[1]
    if call.drawn_with.filter:
        image = np.where(flagged(sampler, ops.to_uint8(image))[:, None, None, None], -1.0, image)
    return [np.float32(image)]


def text_diff(
    bundle: Sampler | Bundle,
    image: np.ndarray,
    source: str,
    target: str,
    *,
    count: int = 8,
    max_theta: float = 1.0,
    steps: int | str | tuple[int, ...] = STEPS,
    guidance_scale: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> np.ndarray:
    """Changes an image from one caption to another: its x_T for the first one stays.

    Args:
      bundle: with the parts clip, latent and autoencoder.
      image: uint8 (H, W, 3).
      source: a caption of the image as it is.
      target: a caption of the image as it should become.
      count: number of images, at least 2. Their theta goes in equal steps from 0 (the image itself) to
        `max_theta`.
      max_theta: in (0, 1]; how far the text states go to those of the target.
      steps, guidance_scale: for both inversion and decoding.
      seed: not used: DDIM draws no noise here.
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
    if source == target:
        raise InputError("the two captions are the same: there is nothing to change")
    sampler, shared = as_sampler(bundle), {"steps": steps, "guidance_scale": guidance_scale}
    _check(sampler, 1, steps, guidance_scale, seed=seed)
    (x_T,) = encode(sampler, [image], captions=[source], **shared).x_T
    drawn = decode(
        sampler, Latents(None, np.repeat(x_T[None], count, axis=0)), captions=[source] * count,
        targets=[target] * count, theta=np.linspace(0, max_theta, count), progress=progress, **shared,
    )  # fmt: skip
    return ops.to_uint8(drawn[-1])


def reconstruct(
    bundle: Sampler | Bundle,
    image: np.ndarray,
    *,
    caption: str = "",
    steps: int | str | tuple[int, ...] = STEPS,
    guidance_scale: float = 1.0,
    progress: Progress | None = None,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """What the autoencoder keeps of an image, and what is left of it after x_T.

    Args:
      bundle: with the parts clip, latent and autoencoder.
      image: uint8 (H, W, 3).
      caption: of the image.
      steps, guidance_scale: for both inversion and decoding.
      progress: called with (images done, total images).

    Returns:
      uint8 (2, H, W, 3): decoded from the image's own latents, and from those that DDIM draws from its x_T;
      and their names.

    Raises:
      ValueError, KeyError: as `encode`.
    """
    sampler, shared = as_sampler(bundle), {"steps": steps, "guidance_scale": guidance_scale}
    latents = encode(sampler, [image], captions=[caption], **shared)
    size = sampler.network("latent").module.image_size * sampler.network("autoencoder").module.factor
    pixels = ops.to_float(square([image], size))

    def make():
        def run(params, image):
            autoencoder = sampler.with_params(params)["autoencoder"]
            return decode_latents(autoencoder, mean_latents(autoencoder, image))

        return run

    run = sampler.program(("latent_reconstruct",), make)
    batch = lambda rows: run(sampler.params, sampler.rows(pixels, rows))
    kept = sampler.in_batches(batch, 1, ["autoencoder"])
    drawn = decode(sampler, latents, captions=[caption], progress=progress, **shared)[0]
    return ops.to_uint8(np.concatenate([kept, drawn])), ("autoencoder", "x_T")
