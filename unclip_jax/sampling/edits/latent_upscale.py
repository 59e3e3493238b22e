"""Upscaling in latents (Rombach et al. 2022, section 4.4): a U-Net that sees the small picture beside the
latents, which are of its size, and the autoencoder, which makes them larger.

`upscale` does the same in pixels, and says how sides that do not fit are handled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.diffusion.process import fold_in
from unclip_jax.errors import InputError
from unclip_jax.generate.latents import decode_latents, sample_latents
from unclip_jax.sampling.edits.upscale import Plan, in_shapes
from unclip_jax.sampling.latent import (
    LATENT,
    check_call,
    check_parts,
    conditions,
    enlarges,
    tile_size,
    tokens,
)
from unclip_jax.sampling.programs import Overrides, Progress, Sampler, as_sampler, row_keys, with_scales


def upscale_rows(
    bundle: Sampler | Bundle,
    images: Sequence[np.ndarray],
    *,
    captions: Sequence[str] | None = None,
    parts: Sequence[str] | None = None,
    seed: int | Sequence[int] = 0,
    positions: Sequence[int] | None = None,
    options: Overrides = None,
    progress: Progress | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Enlarges pictures by the factor of the autoencoder.

    Args:
      bundle: with the parts latent, of Z + 3 input channels, and autoencoder.
      images: uint8 (H, W, 3), any sizes.
      captions: one per picture, where the U-Net reads captions; None for empty ones.
      parts: None, or ["latent"].
      seed, positions, options, progress: as in `upscale.upscale_rows`.

    Yields:
      The number of a picture, and the result, uint8 (factor * H, factor * W, 3).

    Raises:
      ValueError: if the U-Net does not enlarge, an input is not an image, or an option is out of range.
      KeyError: if the bundle lacks a part.
    """
    sampler, count = as_sampler(bundle), len(images)
    check_parts(sampler.bundle)
    if not enlarges(sampler.bundle.part("latent").config["model"]):
        raise InputError(
            f"the part 'latent' of {sampler.bundle.path or 'the bundle'} does not enlarge pictures: that "
            "takes a U-Net that sees the small picture in three more channels"
        )
    for name in parts or ():
        if name != "latent":
            raise InputError(f"{name} is no upsampler of the bundle; choose of latent")
    call = check_call(sampler, "latent", count, seed, positions, options)
    if call.drawn_with.height or call.drawn_with.width:
        raise InputError("the picture says how large the result is: leave height and width out")
    factor, multiple = sampler.network("autoencoder").module.factor, sampler.network("latent").module.multiple
    tile = tile_size(sampler, call.drawn_with)
    told = tokens(sampler, [""] * count if captions is None else list(captions), call)

    def draw(numbers: np.ndarray, batch: np.ndarray, names: list[str]) -> np.ndarray:
        size = batch.shape[1:3]

        def make():
            def run(params, scales, told, low_res, seeds, positions):
                networks, chosen = sampler.with_params(params), with_scales(call.options, scales)
                key = fold_in(row_keys(seeds, positions), LATENT)
                texts, inputs = conditions(networks.get("clip"), networks["latent"], told)
                z = sample_latents(
                    networks["latent"], texts, size, key, chosen["latent"],
                    beside=low_res, inputs=inputs, rows=len(seeds),
                )  # fmt: skip
                return z, decode_latents(networks["autoencoder"], z, tile)

            return run

        run = sampler.program(("latent_upscale", size, tile, *call.options.items()), make)
        scales, words, seeds, places = jax.tree.map(
            lambda array: array[numbers], (call.scales, told, call.seeds, call.positions)
        )
        given = (scales, words, batch, seeds, places)
        rows = lambda rows: run(sampler.params, *sampler.rows(given, rows))
        return sampler.in_batches(rows, len(numbers), ["latent", "autoencoder"], progress)[1]

    plan = lambda sides: Plan(["latent"], factor, (-sides[0] % multiple, -sides[1] % multiple))
    return in_shapes(images, plan, draw)
