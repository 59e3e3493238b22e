"""Inpainting in latents (Rombach et al. 2022, section 4.5; Stable Diffusion).

`trained` uses a U-Net that also sees the mask and the latents of the kept part (2 Z + 1 input channels).
`resample` works with any latent U-Net, without training, by RePaint (`samplers.repaint`) in the latents: it
keeps those of the kept part. The autoencoder decodes the result, and the kept pixels of the input replace
theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.diffusion.process import fold_in, standard_normal
from unclip_jax.diffusion.samplers import repaint
from unclip_jax.errors import InputError
from unclip_jax.generate.denoise import NOISE, STEPS, diffusion_sampler
from unclip_jax.generate.latents import decode_latents, inpainting_inputs, latent_denoiser, sample_latents
from unclip_jax.generate.options import is_guided
from unclip_jax.generate.text import Texts, encode_text
from unclip_jax.sampling.edits.inpaint import check_rows, passes_of, paste, shrink
from unclip_jax.sampling.edits.inversion import square
from unclip_jax.sampling.latent import LATENT, flagged, tile_size
from unclip_jax.sampling.programs import (
    Overrides,
    Progress,
    Sampler,
    as_positions,
    as_sampler,
    as_seeds,
    row_keys,
    split_scales,
    with_scales,
)

NAMES = ("latent_inpaint", "latent")


def part_of(bundle: Bundle, method: str | None) -> tuple[str, str]:
    """The method and the name of the part that inpaints with it; `trained` where the bundle can.

    Raises:
      ValueError: on an unknown method, or where no part of the bundle inpaints with it.
    """
    found = {}
    for name in NAMES:
        if name in bundle.parts:
            model = bundle.parts[name].config["model"]
            trained = model["in_channels"] != model["out_channels"]
            found.setdefault("trained" if trained else "resample", name)
    method = method or ("trained" if "trained" in found else "resample")
    if method not in ("trained", "resample"):
        raise InputError(f"unknown way to inpaint {method!r}; choose one of trained, resample")
    if method not in found:
        kinds = {"trained": "2 Z + 1 input channels", "resample": "Z input channels"}
        raise InputError(
            f"the method {method} needs a latent U-Net of {kinds[method]}, which the bundle lacks"
        )
    return method, found[method]


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
    options: Overrides | Sequence[Overrides] = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Draws the unknown parts of several images, each for its own caption.

    Args:
      bundle: with the parts clip and autoencoder, and `latent` or `latent_inpaint`.
      images, masks, captions, resamples, seed, positions, progress: as in `inpaint.inpaint_rows`.
      method: `trained` or `resample`; None for the first of them that the bundle can.
      options: of the part that inpaints. Its size is that of the training images.

    Returns:
      uint8 (B, S, S, 3). Where a mask keeps its image, these are the pixels of the image's centred square,
      resized to S.

    Raises:
      ValueError: as `inpaint.inpaint_rows`, or where height or width are given.
      KeyError: if the bundle lacks a part.
    """
    images, masks, captions = check_rows(images, masks, captions)
    sampler, count = as_sampler(bundle), len(images)
    for needed in ("clip", "autoencoder"):
        sampler.bundle.part(needed)
    seeds, places = as_seeds(seed, count), as_positions(positions, count)
    method, name = part_of(sampler.bundle, method)
    passes = passes_of(method, resamples)
    rows = [row[name] for row in sampler.row_options(options, count)]
    if any(row.height or row.width for row in rows):
        raise InputError("inpainting draws the size of the training images: leave height and width out")
    if any(row.negative and not is_guided(row) for row in rows):
        raise InputError("a negative caption needs guidance: set a guidance_scale other than 1")
    plain = {row: {name: dataclasses.replace(row, negative="", filter=True)} for row in set(rows)}
    static, scales = split_scales([plain[row] for row in rows])
    first = rows[0]
    tile, side = tile_size(sampler, first), sampler.network(name).module.image_size
    pixels = side * sampler.network("autoencoder").module.factor
    given = ops.to_float(square(images, pixels)), np.stack([shrink(mask, pixels) for mask in masks])

    def make():
        def run(params, scales, captions, negative, given, seeds, positions):
            networks, chosen = sampler.with_params(params), with_scales(static, scales)
            key = fold_in(row_keys(seeds, positions), LATENT)
            texts = Texts(encode_text(networks["clip"], captions), encode_text(networks["clip"], negative))
            latent, autoencoder = networks[name], networks["autoencoder"]
            beside = inpainting_inputs(autoencoder, *given)
            if method == "trained":
                z = sample_latents(latent, texts, (side, side), key, chosen[name], beside=beside)
            else:
                steps = diffusion_sampler(latent.config, chosen[name])
                denoise = latent_denoiser(latent, texts, (side, side), chosen[name], texts.rows)
                # The latents of the whole image: those near the mask's edge have seen the unknown part.
                whole = inpainting_inputs(autoencoder, given[0], jnp.ones_like(given[1]))[..., 1:]
                x = standard_normal(fold_in(key, NOISE), whole.shape)
                z = repaint(
                    denoise, x, steps.schedule, steps.steps, fold_in(key, STEPS),
                    image=whole, known=beside[..., :1] == 0, resamples=passes,
                )  # fmt: skip
            return z, decode_latents(autoencoder, z, tile)

        return run

    run = sampler.program(("latent_inpaint", method, passes, tile, *static.items()), make)
    arrays, negative = sampler.captions(captions), sampler.captions([row.negative for row in rows])

    def batch(rows):
        scale, texts, not_shown, known, numbers, where = sampler.rows(
            (scales, arrays, negative, given, seeds, places), rows
        )
        return run(sampler.params, scale, texts, not_shown, known, numbers, where)

    drawn = sampler.in_batches(batch, count, [name, "autoencoder"], progress)[1]
    drawn = paste(ops.to_uint8(drawn), images, masks)
    if first.filter:
        drawn = np.where(flagged(sampler, drawn)[:, None, None, None], np.uint8(0), drawn)
    return drawn
