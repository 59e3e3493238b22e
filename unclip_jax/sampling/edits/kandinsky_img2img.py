"""Image-to-image with Kandinsky (SDEdit, Meng et al. 2022): the prior draws z_i for the caption, and the
decoder makes its last steps from the noised latents of the picture. `img2img` does the same in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.diffusion.process import fold_in
from unclip_jax.generate.denoise import Start
from unclip_jax.generate.kandinsky import sample_decoder_latents
from unclip_jax.generate.latents import decode_latents, mean_latents
from unclip_jax.sampling.edits.img2img import STRENGTH, check_rows, check_strength
from unclip_jax.sampling.edits.inversion import fitted
from unclip_jax.sampling.kandinsky import (
    DECODE,
    LATENT,
    check_call,
    check_draws,
    draw_embeds,
    made_by,
    words_of,
)
from unclip_jax.sampling.latent import picture_size, tile_size
from unclip_jax.sampling.programs import Overrides, Progress, Sampler, as_sampler, row_keys, with_scales


def img2img_rows(
    bundle: Sampler | Bundle,
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    *,
    strength: float = STRENGTH,
    seed: int | Sequence[int] = 0,
    positions: Sequence[int] | None = None,
    prior: str = "prior_diffusion",
    options: Overrides | Sequence[Overrides] = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Draws pictures again, each for its own caption.

    Args:
      bundle: with the parts clip, latent and autoencoder, and the chosen prior's parts.
      images: uint8 (H, W, 3), any sizes. They are cropped to the proportions of the result and resized.
      captions: one per image.
      strength: in (0, 1]. The decoder makes the last int(strength * N) of its N steps.
      seed, positions, prior, options, progress: as in `kandinsky.sample_stages`. The options `height` and
        `width` are those of the result.

    Returns:
      uint8 (B, H, W, 3).

    Raises:
      ValueError: if an input is not an image, the strength leaves no step, or an option is out of range.
      KeyError: if the bundle lacks a part.
    """
    sampler, captions = as_sampler(bundle), list(captions)
    check_rows(images, captions)
    call = check_call(sampler, len(captions), prior, seed, positions, options)
    check_draws(sampler.bundle)
    check_strength(sampler.network("latent").config, call.options["latent"], strength)
    size, tile = picture_size(sampler, call.drawn_with), tile_size(sampler, call.drawn_with)
    factor = sampler.network("autoencoder").module.factor
    target = ops.to_float(fitted(images, (size[0] * factor, size[1] * factor)))

    def make() -> Callable:
        def run(params, scales, words, image, said, seeds, positions):
            networks, chosen = sampler.with_params(params), with_scales(call.options, scales)
            keys = row_keys(seeds, positions)
            z_text, z, other = draw_embeds(networks, words, None, prior, keys, chosen, said)
            start = Start(mean_latents(networks["autoencoder"], image), strength)
            latents = sample_decoder_latents(
                networks["latent"], z, other, size, fold_in(keys, LATENT), chosen["latent"], start=start
            )
            return z_text, z, latents, decode_latents(networks["autoencoder"], latents, tile, DECODE)

        return run

    key = ("kandinsky_img2img", prior, size, tile, strength, *call.options.items())
    run, words = sampler.program(key, make), words_of(sampler, captions, call)
    given = (call.scales, words.captions, words.negative, target, call.said, call.seeds, call.positions)

    def batch(index):
        scales, texts, negative, *rest = sampler.rows(given, index)
        return run(sampler.params, scales, words._replace(captions=texts, negative=negative), *rest)

    parts = made_by(sampler.bundle, prior)
    return ops.to_uint8(sampler.in_batches(batch, len(captions), parts, progress)[-1])
