"""Inpainting in latents (Rombach et al. 2022, section 4.5; Stable Diffusion).

`trained` uses a U-Net that also sees the mask and the latents of the kept part (2 Z + 1 input channels).
`resample` works with any latent U-Net, without training, by RePaint (`samplers.repaint`) in the latents: it
keeps those of the kept part. The autoencoder decodes the result, and the kept pixels of the input replace
theirs.
"""

from __future__ import annotations

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
from unclip_jax.sampling.edits.inpaint import check_rows, passes_of, paste, shrink
from unclip_jax.sampling.edits.inversion import square
from unclip_jax.sampling.latent import (
    CAPTIONS,
    LATENT,
    Condition,
    check_call,
    check_parts,
    enlarges,
    flagged,
    tile_size,
)
from unclip_jax.sampling.programs import (
    Overrides,
    Progress,
    Sampler,
    as_sampler,
    row_keys,
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
            if not enlarges(model):
                trained = model.get("inpaint", model.get("in_channels") != model.get("out_channels"))
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
    condition: Condition = CAPTIONS,
) -> np.ndarray:
    """Draws the unknown parts of several images, each for its own caption.

    Args:
      bundle: with the parts clip and autoencoder, and `latent` or `latent_inpaint`.
      images, masks, captions, resamples, seed, positions, progress: as in `inpaint.inpaint_rows`.
      method: `trained` or `resample`; None for the first of them that the bundle can.
      options: of the part that inpaints. Its size is that of the training images.
      condition: what the U-Net sees of captions and images.

    Returns:
      uint8 (B, S, S, 3). Where a mask keeps its image, these are the pixels of the image's centred square,
      resized to S.

    Raises:
      ValueError: as `inpaint.inpaint_rows`, or where height or width are given.
      KeyError: if the bundle lacks a part.
    """
    images, masks, captions = check_rows(images, masks, captions)
    sampler, count = as_sampler(bundle), len(images)
    method, name = part_of(sampler.bundle, method)
    check_parts(sampler.bundle, name)
    passes = passes_of(method, resamples)
    call = check_call(sampler, name, count, seed, positions, options)
    if call.drawn_with.height or call.drawn_with.width:
        raise InputError("inpainting draws the size of the training images: leave height and width out")
    tile, side = tile_size(sampler, call.drawn_with), sampler.network(name).module.image_size
    pixels = side * sampler.network("autoencoder").module.factor
    given = ops.to_float(square(images, pixels)), np.stack([shrink(mask, pixels) for mask in masks])

    def make():
        def run(params, scales, told, given, seeds, positions):
            networks, chosen = sampler.with_params(params), with_scales(call.options, scales)
            keys = row_keys(seeds, positions)
            key, latent, autoencoder = fold_in(keys, LATENT), networks[name], networks["autoencoder"]
            texts, inputs = condition.read(networks, name, told, keys, chosen)
            shared = {"inputs": inputs, "rows": len(seeds)}
            beside = inpainting_inputs(autoencoder, *given)
            if method == "trained":
                z = sample_latents(latent, texts, (side, side), key, chosen[name], beside=beside, **shared)
            else:
                steps = diffusion_sampler(latent.config, chosen[name])
                denoise = latent_denoiser(latent, texts, (side, side), chosen[name], **shared)
                # The latents of the whole image: those near the mask's edge have seen the unknown part.
                whole = inpainting_inputs(autoencoder, given[0], jnp.ones_like(given[1]))[..., 1:]
                x = standard_normal(fold_in(key, NOISE), whole.shape)
                z = repaint(
                    denoise, x, steps.schedule, steps.steps, fold_in(key, STEPS),
                    image=whole, known=beside[..., :1] == 0, resamples=passes,
                )  # fmt: skip
            return z, decode_latents(autoencoder, z, tile)

        return run

    key = ("latent_inpaint", condition.read, method, passes, tile, *call.options.items())
    run, told = sampler.program(key, make), condition.arrays(sampler, captions, images, call, name)
    inputs = (call.scales, told, given, call.seeds, call.positions)
    batch = lambda rows: run(sampler.params, *sampler.rows(inputs, rows))
    drawn = sampler.in_batches(batch, count, [name, "autoencoder"], progress)[1]
    drawn = paste(ops.to_uint8(drawn), images, masks)
    if call.drawn_with.filter:
        drawn = np.where(flagged(sampler, drawn)[:, None, None, None], np.uint8(0), drawn)
    return drawn
