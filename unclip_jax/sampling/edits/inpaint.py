"""Inpainting: draws part of an image anew for a caption (GLIDE section 4, applied to unCLIP's decoder).

1. The prior draws z_i for the caption.
2. A decoder fills the unknown part of the image.
3. The upsamplers enlarge the result, and the kept pixels of the input replace theirs in the largest image.

Two methods fill the unknown part. `trained` uses the part `decoder_inpaint`, which is conditioned on the
known pixels. `resample` works with any decoder, without training, by RePaint (`samplers.repaint`).
"""

from __future__ import annotations

from collections.abc import Mapping
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
    Progress,
    Sampler,
    as_sampler,
    as_seed,
    row_keys,
    split_scales,
    with_scales,
)
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
    image, mask = np.asarray(image), np.asarray(mask)
    if mask.dtype != np.bool_ or mask.shape != image.shape[:2]:
        raise InputError(
            "the mask must be boolean and of the image's size "
            f"{image.shape[:2]}, got {mask.dtype} {mask.shape}"
        )
    if count < 1:
        raise InputError(f"the number of pictures must be at least 1, got {count}")
    if resamples is not None and not 1 <= resamples <= MAX_RESAMPLES:
        raise InputError(f"resamples must be between 1 and {MAX_RESAMPLES}, got {resamples}")
    sampler, number = as_sampler(bundle), as_seed(seed)
    method = method or ("trained" if METHODS["trained"] in sampler.bundle.parts else "resample")
    if method not in METHODS:
        raise InputError(f"unknown way to inpaint {method!r}; choose one of {', '.join(METHODS)}")
    if method == "trained" and resamples is not None:
        raise InputError("resamples is for the method resample, not for trained: leave it out")
    resamples, name = resamples or RESAMPLES, METHODS[method]
    for needed in ("clip", name):
        sampler.bundle.part(needed)
    check_prior(sampler.bundle, prior)
    static, scales = split_scales(sampler.options(options))
    small = image_size(sampler.network(name).config)
    target = Known(ops.to_float(square([image], small)), _shrink(mask, small)[None])

    def make():
        def run(params, scales, captions, empty, known, seed, positions):
            networks, chosen = sampler.with_params(params), with_scales(static, scales)
            keys = row_keys(seed, positions)
            texts = encode_captions(networks["clip"], captions, empty)
            z_image = draw_z_image(prior, networks, texts, keys, chosen)
            decoder, key = networks[name], fold_in(keys, DECODER)
            if method == "trained":
                drawn = sample_decoder(decoder, z_image, texts, key, chosen[name], known=known)
            else:
                drawn = inpaint_decoder(decoder, known, z_image, texts, key, chosen[name], resamples)
            z_text = texts.captions.embed
            shown_z = z_text if z_image is None else z_image
            return z_text, shown_z, enlarge(sampler.bundle.parts, networks, drawn, keys, static)

        return run

    run = sampler.program(("inpaint", method, prior, resamples, *static.items()), make)
    captions, empty = sampler.captions([caption]), sampler.captions([""])

    def batch(rows):
        text, known = sampler.rows((captions, target), np.zeros(len(rows), int))
        positions = sampler.rows(np.arange(count, dtype=np.uint32), rows)
        return run(sampler.params, scales, text, empty, known, number, positions)

    parts = made_by(sampler.bundle, prior, name)
    drawn = ops.to_uint8(sampler.in_batches(batch, count, parts, progress)[-1][-1])
    size = drawn.shape[1]
    return np.where(_shrink(mask, size), square([image], size), drawn)


def _shrink(mask: np.ndarray, size: int) -> np.ndarray:
    """Resizes the centred square of a mask, bool (H, W) -> (size, size, 1).

    A pixel is kept only if every input pixel that falls into it is kept.
    """
    square = ops.center_crop_square(np.repeat(mask[..., None], 3, axis=2).astype(np.float32))
    method = "box" if size <= square.shape[0] else "bilinear"
    return ops.resize(square, size, method)[..., :1] > 1 - 1e-4
