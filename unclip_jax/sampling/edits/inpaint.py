"""Inpainting: draws part of an image anew for a caption (GLIDE section 4, applied to unCLIP's decoder).

1. The prior draws z_i for the caption.
2. A decoder fills the unknown part of the image.
3. The upsamplers enlarge the result, and the kept pixels of the input replace theirs in the largest image.

Two methods fill the unknown part. `trained` uses the part `decoder_inpaint`, which is conditioned on the
known pixels. `resample` works with any decoder, without training, by RePaint (`samplers.repaint`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.diffusion.process import fold_in
from unclip_jax.errors import InputError
from unclip_jax.generate.decoder import Known, inpaint_decoder, sample_decoder
from unclip_jax.generate.networks import image_size
from unclip_jax.sampling.edits.inversion import square
from unclip_jax.sampling.programs import (
    Overrides,
    Partial,
    Progress,
    Sampler,
    as_positions,
    as_sampler,
    as_seed,
    as_seeds,
    row_keys,
    split_scales,
    with_scales,
)
from unclip_jax.sampling.stream import stream_stages
from unclip_jax.sampling.unclip import DECODER, check_prior, draw_z_image, encode_captions, enlarge, made_by

RESAMPLES, MAX_RESAMPLES = 5, 1000
METHODS = {"trained": "decoder_inpaint", "resample": "decoder"}  # method -> the part it needs


def inpaint(
    bundle: Sampler | Bundle,
    image: np.ndarray,
    mask: np.ndarray,
    caption: str,
    *,
    count: int = 4,
    method: str | None = None,
    resamples: int | None = None,
    seed: int = 0,
    prior: str = "prior_diffusion",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Draws the unknown part of an image.

    Args:
      bundle: with clip, the method's decoder, the chosen prior's parts, and any number of upsamplers.
      image: uint8 (H, W, 3).
      mask: bool (H, W), True where the image is kept.
      caption: describes the whole image.
      count: number of images to draw.
      method: one of METHODS. None means `trained` if the bundle has its decoder, else `resample`.
      resamples: passes per step of the method `resample` (None: RESAMPLES). More passes match the drawn part
        better to the kept part and take proportionally longer. The method `trained` takes only None.
      seed: whole number below 2**32.
      prior: as in `text_to_image`.
      options: overrides of the bundle's sampling defaults per part. The method `resample` ignores the
        decoder's `sampler` and always uses ancestral sampling.
      progress: called with (images done, total images).

    Returns:
      uint8 (count, S, S, 3), S the largest size. Where the mask keeps the image, these are the pixels of the
      image's centred square, resized to S.

    Raises:
      ValueError: if the mask is not boolean or its size is not the image's, the method is unknown, or an
        option is out of range or not for the method.
      KeyError: if the bundle lacks a part.
    """
    if count < 1:
        raise InputError(f"the number of pictures must be at least 1, got {count}")
    as_seed(seed)
    return inpaint_rows(
        bundle, [image] * count, [mask] * count, [caption] * count,
        method=method, resamples=resamples, seed=seed, prior=prior, options=options, progress=progress,
    )  # fmt: skip


def passes_of(method: str, resamples: int | None) -> int:
    """The passes per step of RePaint that `resamples` asks for; RESAMPLES for None.

    Raises:
      ValueError: if they are out of range, or the method has no passes.
    """
    if resamples is None:
        return RESAMPLES
    if not 1 <= resamples <= MAX_RESAMPLES:
        raise InputError(f"resamples must be between 1 and {MAX_RESAMPLES}, got {resamples}")
    if method == "trained":
        raise InputError("resamples is for the method resample, not for trained: leave it out")
    return resamples


def inpaint_rows(
    bundle: Sampler | Bundle,
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    captions: Sequence[str],
    *,
    method: str | None = None,
    resamples: int | None = None,
    seed: int | Sequence[int] = 0,
    positions: Sequence[int] | None = None,
    prior: str = "prior_diffusion",
    options: Overrides | Sequence[Overrides] = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Draws the unknown parts of several images, each for its own caption.

    Args:
      bundle, method, resamples, prior, progress: as in `inpaint`.
      images, masks, captions: as in `inpaint`, one per row.
      seed, positions, options: as in `unclip.sample_stages`.

    Returns:
      uint8 (B, S, S, 3), as in `inpaint`.

    Raises:
      ValueError, KeyError: as in `inpaint`.
    """
    images, masks, captions = check_rows(images, masks, captions)
    sampler, count = as_sampler(bundle), len(images)
    seeds, places = as_seeds(seed, count), as_positions(positions, count)
    method = method or ("trained" if METHODS["trained"] in sampler.bundle.parts else "resample")
    if method not in METHODS:
        raise InputError(f"unknown way to inpaint {method!r}; choose one of {', '.join(METHODS)}")
    passes, name = passes_of(method, resamples), METHODS[method]
    for needed in ("clip", name):
        sampler.bundle.part(needed)
    check_prior(sampler.bundle, prior)
    static, scales = split_scales(sampler.row_options(options, count))
    target = _known(sampler, name, images, masks)

    def make():
        def run(params, scales, captions, empty, known, seeds, positions):
            networks, chosen = sampler.with_params(params), with_scales(static, scales)
            keys = row_keys(seeds, positions)
            texts = encode_captions(networks["clip"], captions, empty)
            z_image = draw_z_image(prior, networks, texts, keys, chosen)
            decoder, key = networks[name], fold_in(keys, DECODER)
            if method == "trained":
                drawn = sample_decoder(
                    decoder, z_image, texts, key, chosen[name], known=known, clip=networks["clip"]
                )
            else:
                drawn = inpaint_decoder(decoder, known, z_image, texts, key, chosen[name], passes)
            z_text = texts.captions.embed
            shown_z = z_text if z_image is None else z_image
            return z_text, shown_z, enlarge(sampler.bundle.parts, networks, drawn, keys, static)

        return run

    run = sampler.program(("inpaint", method, prior, passes, *static.items()), make)
    texts, empty = sampler.captions(captions), sampler.captions([""])

    def batch(rows):
        scale, text, known, numbers, where = sampler.rows((scales, texts, target, seeds, places), rows)
        return run(sampler.params, scale, text, empty, known, numbers, where)

    parts = made_by(sampler.bundle, prior, name)
    drawn = ops.to_uint8(sampler.in_batches(batch, count, parts, progress)[-1][-1])
    return paste(drawn, images, masks)


def stream_rows(
    bundle: Sampler | Bundle,
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    captions: Sequence[str],
    *,
    partials: int,
    seed: int | Sequence[int] = 0,
    positions: Sequence[int] | None = None,
    prior: str = "prior_diffusion",
    options: Overrides | Sequence[Overrides] = None,
) -> Iterator[Partial | np.ndarray]:
    """`inpaint_rows` of the method `trained` for at most one batch, which shows `partials` pictures on the
    way.

    Yields:
      A `programs.Partial` per stop, then what `inpaint_rows` returns.

    Raises:
      ValueError, KeyError: as `inpaint_rows`; KeyError where the bundle has no decoder that inpaints.
    """
    images, masks, captions = check_rows(images, masks, captions)
    sampler, name = as_sampler(bundle), METHODS["trained"]
    for made in stream_stages(
        sampler, captions, partials=partials, seed=seed, prior=prior, positions=positions, options=options,
        known=_known(sampler, name, images, masks), decoder=name,
    ):  # fmt: skip
        last = not isinstance(made, Partial)
        yield paste(ops.to_uint8(made.images[-1]), images, masks) if last else made


def check_rows(
    images: Sequence[np.ndarray], masks: Sequence[np.ndarray], captions: Sequence[str]
) -> tuple[list[np.ndarray], list[np.ndarray], list[str]]:
    """The rows of a call. Raises ValueError unless there is a mask of each image's size and a caption for
    it."""
    images, masks, captions = [np.asarray(i) for i in images], [np.asarray(m) for m in masks], list(captions)
    if not 0 < len(images) == len(masks) == len(captions):
        counts = f"{len(images)}, {len(masks)} and {len(captions)}"
        raise InputError(f"expected one mask and one caption per image, and at least one, got {counts}")
    for image, mask in zip(images, masks):
        if mask.dtype != np.bool_ or mask.shape != image.shape[:2]:
            raise InputError(
                "the mask must be boolean and of the image's size "
                f"{image.shape[:2]}, got {mask.dtype} {mask.shape}"
            )
    return images, masks, captions


def _known(sampler: Sampler, name: str, images: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> Known:
    # What the decoder `name` keeps of the images.
    size = image_size(sampler.network(name).config)
    return Known(ops.to_float(square(images, size)), np.stack([shrink(mask, size) for mask in masks]))


def paste(drawn: np.ndarray, images: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures uint8 (B, S, S, 3) with the images' own pixels where the masks keep them."""
    size = drawn.shape[1]
    kept = np.stack([shrink(mask, size) for mask in masks])
    return np.where(kept, square(images, size), drawn)


def shrink(mask: np.ndarray, size: int) -> np.ndarray:
    """Resizes the centred square of a mask, bool (H, W) -> (size, size, 1).

    A pixel is kept only if every input pixel that falls into it is kept.
    """
    square = ops.center_crop_square(np.repeat(mask[..., None], 3, axis=2).astype(np.float32))
    method = "box" if size <= square.shape[0] else "bilinear"
    return ops.resize(square, size, method)[..., :1] > 1 - 1e-4
