"""Inpainting with Kandinsky: the prior draws z_i for the caption, and the decoder the unknown latents.

`trained` uses the decoder that also sees the known latents. `resample` works with the other one, without
training, by RePaint (`samplers.repaint`) in the latents. The autoencoder decodes the result, and the kept
pixels of the input replace theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.diffusion.process import fold_in
from unclip_jax.errors import InputError
from unclip_jax.generate.kandinsky import known_latents, repaint_decoder_latents, sample_decoder_latents
from unclip_jax.generate.latents import decode_latents
from unclip_jax.sampling.edits.inpaint import check_rows, passes_of, paste, shrink
from unclip_jax.sampling.edits.inversion import square
from unclip_jax.sampling.edits.latent_inpaint import part_of
from unclip_jax.sampling.kandinsky import DECODE, LATENT, check_call, draw_embeds, made_by, words_of
from unclip_jax.sampling.latent import tile_size
from unclip_jax.sampling.programs import Overrides, Progress, Sampler, as_sampler, row_keys, with_scales


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
      bundle: with clip, autoencoder, the chosen prior's parts, and `latent` or `latent_inpaint`.
      images, masks, captions, resamples, seed, positions, prior, progress: as in `inpaint.inpaint_rows`.
      method: `trained` or `resample`; None for the first of them that the bundle can.
      options: of the parts that draw. The size is that of the training images.

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
    passes = passes_of(method, resamples)
    call = check_call(sampler, count, prior, seed, positions, options, name)
    if call.drawn_with.height or call.drawn_with.width:
        raise InputError("inpainting draws the size of the training images: leave height and width out")
    tile, side = tile_size(sampler, call.drawn_with), sampler.network(name).module.image_size
    pixels = side * sampler.network("autoencoder").module.factor
    target = ops.to_float(square(images, pixels)), np.stack([shrink(mask, pixels) for mask in masks])

    def make() -> Callable:
        def run(params, scales, words, target, said, seeds, positions):
            networks, chosen = sampler.with_params(params), with_scales(call.options, scales)
            keys = row_keys(seeds, positions)
            z_text, z, other = draw_embeds(networks, words, None, prior, keys, chosen, said)
            latent, autoencoder, key = networks[name], networks["autoencoder"], fold_in(keys, LATENT)
            known, size = known_latents(autoencoder, *target), (side, side)
            if method == "trained":
                drawn = sample_decoder_latents(latent, z, other, size, key, chosen[name], known=known)
            else:
                drawn = repaint_decoder_latents(latent, z, other, key, chosen[name], known, passes)
            return z_text, z, drawn, decode_latents(autoencoder, drawn, tile, DECODE)

        return run

    key = ("kandinsky_inpaint", method, prior, passes, tile, *call.options.items())
    run, words = sampler.program(key, make), words_of(sampler, captions, call)
    given = (call.scales, words.captions, words.negative, target, call.said, call.seeds, call.positions)

    def batch(index):
        scales, texts, negative, *rest = sampler.rows(given, index)
        return run(sampler.params, scales, words._replace(captions=texts, negative=negative), *rest)

    drawn = sampler.in_batches(batch, count, made_by(sampler.bundle, prior, name), progress)[-1]
    return paste(ops.to_uint8(drawn), images, masks)
