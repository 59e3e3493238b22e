"""Encodes an image as the pair (z_i, x_T), and decodes the pair (unCLIP section 3).

z_i is CLIP's embedding: it holds what CLIP recognizes in the image. x_T is the noise from which the decoder,
conditioned on z_i, reproduces the image: it holds the rest. DDIM run backwards gives x_T. All of the paper's
image edits change one or both of them, and decode.

The decoder runs without clipping and, by default, at guidance scale 1, because inversion cannot undo clipping
or guidance well. Captions are empty by default. Images are cropped to their centred square and resized to the
networks' sizes. The upsamplers enlarge the decoder's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, upsamplers
from unclip_jax.data import ops
from unclip_jax.data.tokenizer import warn_of_cuts
from unclip_jax.diffusion.process import fold_in, standard_normal
from unclip_jax.errors import InputError
from unclip_jax.generate.decoder import invert_decoder, sample_decoder
from unclip_jax.generate.networks import image_size
from unclip_jax.generate.options import SamplingOptions
from unclip_jax.sampling.programs import (
    Partial,
    Progress,
    Sampler,
    as_positions,
    as_sampler,
    as_seed,
    as_seeds,
    row_keys,
    split_scales,
    with_scale,
)
from unclip_jax.sampling.stream import stream_stages
from unclip_jax.sampling.unclip import DECODER, check_embeddings, encode_captions, enlarge

STEPS = 50


class Latents(NamedTuple):
    """NumPy arrays: z_image (N, D), raw CLIP embeddings; x_T (N, h, w, C), the noise.

    With x_T None, `decode` draws the noise. z_image is None in a system without image embeddings.
    """

    z_image: np.ndarray | None
    x_T: np.ndarray | None = None


def slerp(a: np.ndarray, b: np.ndarray, theta: np.ndarray | float) -> np.ndarray:
    """Spherical interpolation of flattened rows.

    The direction turns at constant speed from a's to b's; the norm changes linearly.

    Args:
      a, b: (N, ...) rows, none of them zero. Two opposite rows are an error: no unique arc joins them.
      theta: () or (N,) in [0, 1]; 0 gives a, 1 gives b.

    Returns:
      (N, ...) float32.

    Raises:
      ValueError: if a row is zero, or two rows are opposite.
    """
    shape = np.broadcast_shapes(np.shape(a), np.shape(b))
    a, b = (np.broadcast_to(np.asarray(v, np.float64), shape).reshape(shape[0], -1) for v in (a, b))
    theta = np.broadcast_to(np.asarray(theta, np.float64), shape[:1])[:, None]
    norm_a, norm_b = (np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
    if np.any(norm_a == 0) or np.any(norm_b == 0):
        raise InputError("slerp needs vectors that are not zero")
    a, b = a / norm_a, b / norm_b
    omega = np.arccos(np.clip(np.sum(a * b, axis=1, keepdims=True), -1, 1))
    if np.any(omega > np.pi - 1e-6):
        raise InputError("slerp between opposite vectors is not defined")
    near = omega < 1e-6  # sin(omega) vanishes here, and the chord equals the arc
    safe = np.where(near, 1.0, np.sin(omega))
    weight_a = np.where(near, 1 - theta, np.sin((1 - theta) * omega) / safe)
    weight_b = np.where(near, theta, np.sin(theta * omega) / safe)
    norm = (1 - theta) * norm_a + theta * norm_b
    return (norm * (weight_a * a + weight_b * b)).reshape(shape).astype(np.float32)


def square(images: Sequence[np.ndarray] | np.ndarray, size: int) -> np.ndarray:
    """Crops uint8 images (H, W, 3) to their centred squares and resizes them, uint8 (N, size, size, 3).

    Raises:
      ValueError: if there are no images, or one is not uint8 (H, W, 3).
    """
    return fitted(images, (size, size))


def fitted(images: Sequence[np.ndarray] | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Crops uint8 images (H, W, 3) to the proportions of `size`, a (height, width), and resizes them to it,
    uint8 (N, height, width, 3).

    Raises:
      ValueError: as `square`.
    """
    if len(images) == 0:
        raise InputError("no images: give at least one")
    for image in images:
        if np.ndim(image) != 3 or np.shape(image)[2] != 3 or np.asarray(image).dtype != np.uint8:
            raise InputError(
                f"images must be uint8 (H, W, 3), got {np.asarray(image).dtype} {np.shape(image)}"
            )
    return np.stack([ops.resize(ops.center_crop(np.asarray(image), size), size) for image in images])


def embed_images(
    bundle: Sampler | Bundle,
    images: Sequence[np.ndarray] | np.ndarray,
    *,
    projected: bool = True,
    max_batch: int | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Embeds images with CLIP.

    Args:
      bundle: with clip.
      images: uint8 (H, W, 3), any sizes.
      projected: False gives the image tower's features before the projection.
      max_batch: largest number of images at a time on each device; None means `programs.MAX_BATCH`.
      progress: called with (images done, total images).

    Returns:
      Raw embeddings (N, D); not projected: features (N, W), W the image tower's width.

    Raises:
      ValueError: if there are no images, or the CLIP has no image encoder.
    """
    sampler = as_sampler(bundle)
    clip = sampler.network("clip")
    if clip.config["model"]["image"] is None:
        raise InputError(
            f"the CLIP of {sampler.bundle.path or 'the bundle'} has no image encoder, "
            "so it cannot embed images"
        )
    size = clip.config["model"]["image"]["image_size"]
    method = "encode_image" if projected else "image_features"
    encode = sampler.program(
        method, lambda: lambda params, x: clip.with_params(params).apply(x, method=method)
    )

    def run(index):
        rows = ops.to_float(square([images[i] for i in index], size))
        return encode(clip.params, sampler.rows(rows, np.arange(len(index))))

    if len(images) == 0:
        raise InputError("no images: give at least one")
    return sampler.in_batches(run, len(images), ["clip"], progress, max_batch)


def embed_captions(
    bundle: Sampler | Bundle, captions: Sequence[str], *, max_batch: int | None = None
) -> np.ndarray:
    """Embeds captions with CLIP: raw text embeddings (N, D)."""
    sampler, captions = as_sampler(bundle), list(captions)
    clip, (tokens, _) = sampler.network("clip"), sampler.tokenizer(captions)
    warn_of_cuts(captions, sampler.tokenizer)
    encode = sampler.program(
        "embed_captions",
        lambda: lambda params, tokens: clip.with_params(params).apply(tokens, method="encode_text").embed,
    )
    return sampler.in_batches(
        lambda index: encode(clip.params, sampler.rows(tokens, index)), len(tokens), ["clip"], None, max_batch
    )


def row_scales(guidance_scale: float | Sequence[float], count: int) -> list[float]:
    """One guidance scale per image, from one for all or one each. Raises ValueError on another number."""
    if np.ndim(guidance_scale) and np.shape(guidance_scale) != (count,):
        raise InputError(f"expected one guidance scale, or one per image, {count}, got {guidance_scale!r}")
    return np.broadcast_to(guidance_scale, count).tolist()


def row_captions(captions: Sequence[str] | None, count: int) -> list[str]:
    """One caption per image; None means empty ones. Raises ValueError on another number."""
    captions = [""] * count if captions is None else list(captions)
    if len(captions) != count:
        raise InputError(f"expected one caption per image, got {len(captions)} and {count}")
    return captions


def check_edit(
    sampler: Sampler, steps: Any, guidance_scale: float, *, eta: float = 0.0, seed: int = 0
) -> SamplingOptions:
    """The decoder's options to invert and decode with. An edit calls it first, before any network runs.

    Raises:
      ValueError: if an option or the seed is out of range.
      KeyError: if the bundle lacks the clip or the decoder.
    """
    sampler.network("clip"), sampler.network("decoder"), as_seed(seed)
    settings = {
        "sampler": "ddim",
        "eta": eta,
        "guidance_scale": guidance_scale,
        "clip": None,
        "threshold": None,
        "threshold_most": None,
    }
    return sampler.options({"decoder": {"steps": steps, **settings}})["decoder"]


def _row_options(
    sampler: Sampler, steps: Any, guidance_scale: float | Sequence[float], eta: float, count: int
) -> list[SamplingOptions]:
    """The options of `count` rows, which differ in their guidance scales at most."""
    return [check_edit(sampler, steps, scale, eta=eta) for scale in row_scales(guidance_scale, count)]


def _texts(
    sampler: Sampler, captions: Sequence[str] | None, count: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Tokenizes the captions (empty ones if None) and the empty caption for all networks."""
    return sampler.captions(row_captions(captions, count)), sampler.captions([""])


def encode(
    bundle: Sampler | Bundle,
    images: Sequence[np.ndarray] | np.ndarray,
    *,
    steps: int | str | tuple[int, ...] = STEPS,
    guidance_scale: float | Sequence[float] = 1.0,
    captions: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Latents:
    """Finds (z_i, x_T) of images.

    Args:
      bundle: with clip and decoder.
      images: uint8 (H, W, 3), any sizes.
      steps: DDIM steps, see `schedule.time_steps`. Twice as many steps halve the error of inverting and
        decoding.
      guidance_scale: the decoder's, one for all images or one per image. Use the same in `decode`. Images of
        one call are all guided, or none is.
      captions: one per image. None means empty captions.
      progress: called with (images done, total images).

    Raises:
      ValueError: if an input is not an image, or an option is out of range.
      KeyError: if the bundle lacks a part.
    """
    sampler = as_sampler(bundle)
    size = image_size(sampler.network("decoder").config)
    chosen = _row_options(sampler, steps, guidance_scale, 0.0, len(images))
    rows = ops.to_float(square(images, size))
    texts, empty = _texts(sampler, captions, len(rows))
    static, scales = split_scales([{"decoder": options} for options in chosen])
    z_image = embed_images(sampler, images)

    def make():
        def run(params, scale, texts, empty, image, z):
            networks, options = sampler.with_params(params), with_scale(static["decoder"], scale)
            encoded = encode_captions(networks["clip"], texts, empty)
            return invert_decoder(networks["decoder"], image, z, encoded, options)

        return run

    run = sampler.program(("invert", static["decoder"]), make)

    def batch(index):
        scale, chosen, image, z = sampler.rows((scales["decoder"], texts, rows, z_image), index)
        return run(sampler.params, scale, chosen, empty, image, z)

    return Latents(z_image, sampler.in_batches(batch, len(rows), ["decoder"], progress))


def decode(
    bundle: Sampler | Bundle,
    latents: Latents,
    *,
    steps: int | str | tuple[int, ...] = STEPS,
    eta: float = 0.0,
    guidance_scale: float | Sequence[float] = 1.0,
    captions: Sequence[str] | None = None,
    seed: int | Sequence[int] = 0,
    positions: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """Draws images from (z_i, x_T) with DDIM, and enlarges them.

    Args:
      bundle: with clip, decoder, and any number of upsamplers.
      latents: z_image (N, D) raw embeddings; x_T (N, h, w, 3). If x_T is None, the seed determines the noise.
      steps, guidance_scale, captions: as in `encode`.
      eta: noise of DDIM, in [0, 1]. 0 is deterministic; 1 lets everything vary that z_i does not hold.
      seed: whole number below 2**32, or a list with one per image.
      positions: (N,) whole numbers; None means 0 to N - 1. Row i draws its noise for (seed, positions[i]),
        so rows of equal positions get equal noise.
      progress: called with (images done, total images).

    Returns:
      One float32 array (N, H, W, 3) in [-1, 1] per size, the decoder's first.

    Raises:
      ValueError: if a shape does not match, or an option is out of range.
      KeyError: if the bundle lacks a part.
    """
    sampler = as_sampler(bundle)
    size = image_size(sampler.network("decoder").config)
    z_image, noise = check_embeddings(sampler, latents.z_image), latents.x_T
    count = len(z_image)
    if noise is not None and np.shape(noise) != (count, size, size, 3):
        raise InputError(f"x_T must be {(count, size, size, 3)}, got {np.shape(noise)}")
    seeds, places = as_seeds(seed, count), as_positions(positions, count)
    chosen = _row_options(sampler, steps, guidance_scale, eta, count)
    texts, empty = _texts(sampler, captions, count)
    defaults, names = sampler.options(), upsamplers(sampler.bundle.parts)
    shared = {name: defaults[name] for name in names}
    static, scales = split_scales([{"decoder": options, **shared} for options in chosen])

    def make():
        def run(params, scale, texts, empty, z, x_T, seeds, positions):
            networks, options = sampler.with_params(params), with_scale(static["decoder"], scale)
            keys = row_keys(seeds, positions)
            encoded = encode_captions(networks["clip"], texts, empty)
            drawn = sample_decoder(networks["decoder"], z, encoded, fold_in(keys, DECODER), options, x_T=x_T)
            return enlarge(sampler.bundle.parts, networks, drawn, keys, static)

        return run

    run = sampler.program(("decode", noise is not None, *static.items()), make)
    given = None if noise is None else np.asarray(noise, np.float32)

    def batch(index):
        scale, text, z, x, numbers, where = sampler.rows(
            (scales["decoder"], texts, z_image, given, seeds, places), index
        )
        return run(sampler.params, scale, text, empty, z, x, numbers, where)

    return sampler.in_batches(batch, count, ["decoder", *names], progress)


def stream_decode(
    bundle: Sampler | Bundle,
    latents: Latents,
    *,
    partials: int,
    steps: int | str | tuple[int, ...] = STEPS,
    eta: float = 0.0,
    guidance_scale: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
    positions: Sequence[int] | None = None,
) -> Iterator[Partial | list[np.ndarray]]:
    """`decode` for at most one batch and empty captions, with `partials` pictures shown on the way.

    Yields:
      A `programs.Partial` per stop, then what `decode` returns.

    Raises:
      ValueError, KeyError: as `decode`.
    """
    sampler, count = as_sampler(bundle), len(latents.z_image)
    chosen = _row_options(sampler, steps, guidance_scale, eta, count)
    options = [{"decoder": vars(one)} for one in chosen]
    noise = None if latents.x_T is None else np.asarray(latents.x_T, np.float32)
    for made in stream_stages(
        sampler, [""] * count, partials=partials, seed=seed, z_image=latents.z_image,
        positions=positions, options=options, x_T=noise,
    ):  # fmt: skip
        yield made if isinstance(made, Partial) else made.images


def one_noise(shape: tuple[int, ...], count: int, seed: int) -> np.ndarray:
    """Draws one random x_T of `shape` and repeats it for `count` rows: (count, *shape) float32."""
    noise = standard_normal(jax.random.fold_in(jax.random.key(as_seed(seed)), 0), (1, *shape))
    return np.repeat(np.asarray(noise), count, axis=0)


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], (N, ...) -> (N,); infinite for equal images."""
    error = np.mean(np.square(np.asarray(a, np.float64) - b).reshape(len(a), -1), axis=1)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(4.0 / error)
