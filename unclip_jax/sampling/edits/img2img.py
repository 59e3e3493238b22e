"""Image-to-image: draws a picture again for a caption, from its noised copy (SDEdit, Meng et al. 2022).

The picture is noised to a step on the way, and the network makes the steps from there. The strength is the
share of the steps: a low one keeps the picture's shapes and colours, and 1 keeps almost nothing.

Here unCLIP's decoder draws. The prior draws z_i for the caption, and the upsamplers enlarge the result.
`latent_img2img` does the same in latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.diffusion.process import fold_in
from unclip_jax.errors import InputError
from unclip_jax.generate.decoder import sample_decoder
from unclip_jax.generate.denoise import Start, diffusion_sampler
from unclip_jax.generate.networks import image_size
from unclip_jax.generate.options import Options
from unclip_jax.sampling.edits.inversion import square
from unclip_jax.sampling.programs import (
    Overrides,
    Progress,
    Sampler,
    as_sampler,
    row_keys,
    with_scales,
)
from unclip_jax.sampling.unclip import DECODER, check_call, draw_z_image, encode_captions, enlarge, made_by

STRENGTH = 0.8


def check_rows(images: Sequence[np.ndarray], captions: Sequence[str]) -> None:
    """Raises ValueError unless there is at least one image, and a caption for each."""
    if not 0 < len(images) == len(captions):
        raise InputError(
            f"expected one caption per image, and at least one, got {len(captions)} and {len(images)}"
        )


def check_strength(config: dict, options: Options, strength: float) -> None:
    """Raises ValueError when a strength is out of range, or leaves no step of a part's sampler."""
    nothing = np.zeros((), np.float32)
    diffusion_sampler(config, options).begin(nothing, Start(nothing, strength))


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
      bundle: with clip, decoder, the chosen prior's parts, and any number of upsamplers.
      images: uint8 (H, W, 3), any sizes.
      captions: one per image.
      strength: in (0, 1]. The decoder makes the last int(strength * N) of its N steps.
      seed, positions, prior, options, progress: as in `unclip.sample_stages`.

    Returns:
      uint8 (B, S, S, 3), S the largest size: pictures of the images' centred squares.

    Raises:
      ValueError: if an input is not an image, the strength leaves no step, or an option is out of range.
      KeyError: if the bundle lacks a part.
    """
    sampler, captions = as_sampler(bundle), list(captions)
    check_rows(images, captions)
    call = check_call(sampler, captions, seed, prior, None, positions, options)
    decoder = sampler.network("decoder")
    check_strength(decoder.config, call.options["decoder"], strength)
    target = ops.to_float(square(images, image_size(decoder.config)))

    def make():
        def run(params, scales, captions, empty, image, seeds, positions):
            networks, chosen = sampler.with_params(params), with_scales(call.options, scales)
            keys = row_keys(seeds, positions)
            texts = encode_captions(networks["clip"], captions, empty)
            z_image = draw_z_image(prior, networks, texts, keys, chosen)
            drawn = sample_decoder(
                networks["decoder"], z_image, texts, fold_in(keys, DECODER), chosen["decoder"],
                start=Start(image, strength), clip=networks["clip"],
            )  # fmt: skip
            z_text = texts.captions.embed
            shown_z = z_text if z_image is None else z_image
            return z_text, shown_z, enlarge(sampler.bundle.parts, networks, drawn, keys, call.options)

        return run

    run = sampler.program(("img2img", prior, strength, *call.options.items()), make)
    texts, empty = sampler.captions(captions), sampler.captions([""])

    def batch(rows):
        scale, text, image, numbers, where = sampler.rows(
            (call.scales, texts, target, call.seeds, call.positions), rows
        )
        return run(sampler.params, scale, text, empty, image, numbers, where)

    drawn = sampler.in_batches(batch, len(captions), made_by(sampler.bundle, prior), progress)
    return ops.to_uint8(drawn[-1][-1])
