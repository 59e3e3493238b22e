"""Image-to-image in latents (SDEdit, Meng et al. 2022; Rombach et al. 2022, Stable Diffusion's `img2img`).

The autoencoder's latents of the picture, drawn from its Gaussian, are noised to a step on the way. The U-Net
makes the steps from there. `img2img` does the same in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.diffusion.process import fold_in
from unclip_jax.generate.denoise import Start
from unclip_jax.generate.latents import decode_latents, encode_latents, sample_latents
from unclip_jax.sampling.edits.img2img import STRENGTH, check_rows, check_strength
from unclip_jax.sampling.edits.inversion import fitted
from unclip_jax.sampling.latent import (
    CAPTIONS,
    LATENT,
    Condition,
    check_call,
    check_draws,
    check_parts,
    flagged,
    picture_size,
    tile_size,
)
from unclip_jax.sampling.programs import Overrides, Progress, Sampler, as_sampler, row_keys, with_scales

ENCODED = 1  # what the draw of the autoencoder's latents folds into a row's random key


def img2img_rows(
    bundle: Sampler | Bundle,
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    *,
    strength: float = STRENGTH,
    seed: int | Sequence[int] = 0,
    positions: Sequence[int] | None = None,
    options: Overrides | Sequence[Overrides] = None,
    progress: Progress | None = None,
    condition: Condition = CAPTIONS,
) -> np.ndarray:
    """Draws pictures again, each for its own caption.

    Args:
      bundle: as in `latent.sample_stages`; so are the captions.
      images: uint8 (H, W, 3), any sizes. They are cropped to the proportions of the result and resized.
      captions: one per image.
      strength: in (0, 1]. The U-Net makes the last int(strength * N) of its N steps.
      seed, positions, options, progress: as in `latent.sample_stages`. The options `height` and `width` are
        those of the result.
      condition: what the U-Net sees of captions and images.

    Returns:
      uint8 (B, H, W, 3).

    Raises:
      ValueError: if an input is not an image, the strength leaves no step, or an option is out of range.
      KeyError: if the bundle lacks a part.
    """
    sampler, captions = as_sampler(bundle), list(captions)
    check_rows(images, captions)
    check_parts(sampler.bundle)
    check_draws(sampler.bundle)
    call = check_call(sampler, "latent", len(captions), seed, positions, options)
    check_strength(sampler.network("latent").config, call.options["latent"], strength)
    size, tile = picture_size(sampler, call.drawn_with), tile_size(sampler, call.drawn_with)
    factor = sampler.network("autoencoder").module.factor
    target = ops.to_float(fitted(images, (size[0] * factor, size[1] * factor)))

    def make():
        def run(params, scales, told, image, seeds, positions):
            networks, chosen = sampler.with_params(params), with_scales(call.options, scales)
            keys = row_keys(seeds, positions)
            texts, inputs = condition.read(networks, "latent", told, keys, chosen)
            x0 = encode_latents(networks["autoencoder"], {"image": image}, fold_in(keys, ENCODED))
            z = sample_latents(
                networks["latent"], texts, size, fold_in(keys, LATENT), chosen["latent"],
                inputs=inputs, rows=len(seeds), start=Start(x0, strength),
            )  # fmt: skip
            return z, decode_latents(networks["autoencoder"], z, tile)

        return run

    key = ("latent_img2img", condition.read, size, tile, strength, *call.options.items())
    run, told = sampler.program(key, make), condition.arrays(sampler, captions, images, call, "latent")
    given = (call.scales, told, target, call.seeds, call.positions)
    batch = lambda rows: run(sampler.params, *sampler.rows(given, rows))
    drawn = sampler.in_batches(batch, len(captions), ["latent", "autoencoder"], progress)[1]
    drawn = ops.to_uint8(drawn)
    if call.drawn_with.filter:
        drawn = np.where(flagged(sampler, drawn)[:, None, None, None], np.uint8(0), drawn)
    return drawn
