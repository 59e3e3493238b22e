"""unCLIP's cascade: text, prior, decoder and upsamplers in one compiled program (unCLIP section 2).

Guidance scales are arguments of the program: changing one does not compile again, except between 1 (no guidance) and not 1.
Every row has its own random key: the picture of (caption, seed, position) does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part, last_step, upsamplers
from unclip_jax.diffusion.process import fold_in
from unclip_jax.errors import InputError
from unclip_jax.generate.decoder import sample_decoder
from unclip_jax.generate.networks import Network
from unclip_jax.generate.options import Options
from unclip_jax.generate.prior import sample_prior
from unclip_jax.generate.text import Texts, encode_text
from unclip_jax.generate.upsampler import sample_upsampler
from unclip_jax.models.codec import Codec
from unclip_jax.sampling.programs import Progress, Sampler, as_sampler, row_keys, split_scales, with_scales

# Folds of a row's random key: the stages of the cascade. The upsamplers take the numbers from UPSAMPLERS on.
PRIOR, DECODER, UPSAMPLERS = 0, 1, 2
# Ways to z_i, and the parts that each needs. `none`: the text embedding takes its place; `null`: the null embedding does.
PRIORS: dict[str, tuple[str, ...]] = {
    "prior_diffusion": ("prior_diffusion",),
    "prior_ar": ("prior_ar", "codec"),
    "none": (),
    "null": (),
}


class Stages(NamedTuple):
    """What each stage drew, as NumPy: z_text, z_image (B, D) raw embeddings; images, one float array (B, H, W, 3) in [-1, 1] per size, the
    decoder's first. Without an embedding (prior `null`) z_image is zero."""

    z_text: np.ndarray
    z_image: np.ndarray
    images: list[np.ndarray]


def check_prior(bundle: Bundle, prior: str) -> None:
    """Raises ValueError on an unknown way to z_i, KeyError when the bundle lacks its parts."""
    if prior not in PRIORS:
        raise InputError(f"unknown prior {prior!r}; choose one of {', '.join(PRIORS)}")
    for name in PRIORS[prior]:
        bundle.part(name)


def encode_captions(
    clip: Network, captions: Mapping[str, jax.Array], empty: Mapping[str, jax.Array]
) -> Texts:
    """Captions (B rows of `Sampler.captions`) and the empty caption (one row), encoded."""
    return Texts(encode_text(clip, captions), encode_text(clip, empty))


def draw_z_image(
    prior: str, networks: Mapping[str, Network], texts: Texts, keys: jax.Array, options: Mapping[str, Options]
) -> jax.Array | None:
    """z_i (B, D) for captions, by one of PRIORS; None for the null embedding. keys: (B,), of the rows."""
    if prior == "none":
        return texts.captions.embed
    if prior == "null":
        return None
    codec = Codec(**networks["codec"].params) if prior == "prior_ar" else None
    return sample_prior(networks[prior], texts, fold_in(keys, PRIOR), options[prior], codec)


def enlarge(
    parts: Mapping[str, Part],
    networks: Mapping[str, Network],
    image: jax.Array,
    keys: jax.Array,
    options: Mapping[str, Options],
) -> list[jax.Array]:
    """What the decoder drew (B, h, w, 3), and after it what each upsampler makes of the one before, in the order of their sizes.

    keys: (B,), of the rows.
    """
    images = [image]
    for i, name in enumerate(upsamplers(parts)):
        final = last_step(parts, name)
        last = None if final is None else networks[final]
        key = fold_in(keys, UPSAMPLERS + i)
        images.append(sample_upsampler(networks[name], images[-1], key, options[name], last))
    return images


def _cascade(sampler: Sampler, options: dict[str, Options], prior: str | None) -> Callable:
    # prior None: z_i is given.
    def run(params, scales, captions, empty, z_image, seed, positions):
        networks, chosen = sampler.with_params(params), with_scales(options, scales)
        keys = row_keys(seed, positions)
        texts = encode_captions(networks["clip"], captions, empty)
        if prior is not None:
            z_image = draw_z_image(prior, networks, texts, keys, chosen)
        drawn = sample_decoder(networks["decoder"], z_image, texts, fold_in(keys, DECODER), chosen["decoder"])
        images = enlarge(sampler.bundle.parts, networks, drawn, keys, options)
        z_text = texts.captions.embed
        return z_text, jnp.zeros_like(z_text) if z_image is None else z_image, images

    return run


def sample_stages(
    bundle: Sampler | Bundle,
    captions: Sequence[str],
    *,
    seed: int = 0,
    prior: str = "prior_diffusion",
    z_image: np.ndarray | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> Stages:
    """Runs the cascade and keeps what every stage drew.

    Args:
      bundle: with parts clip, decoder, the prior chosen, and any number of upsamplers.
      captions: any number of texts, of any length (cut to the tokenizer's slots).
      seed: non-negative integer.
      prior: `prior_diffusion` or `prior_ar`; or, as in the paper's ablation, `none`: the text embedding takes the place of z_i, or `null`:
        the decoder's null embedding does, and the caption alone says what to draw.
      z_image: (B, D) raw image embeddings, one per caption, to be drawn instead of the prior's.
      options: overrides of the bundle's sampling defaults per part.
      progress: called with (images done, images in all) after each batch.

    Returns:
      The stages' arrays.

    Raises:
      ValueError: when there are no captions, another number of embeddings, or options are out of range; KeyError when the bundle lacks a
        part.
    """
    sampler, captions = as_sampler(bundle), list(captions)
    if not captions:
        raise InputError("no captions: give at least one")
    for name in ("clip", "decoder"):
        sampler.bundle.part(name)
    chosen_prior = prior if z_image is None else None
    if chosen_prior is not None:
        check_prior(sampler.bundle, chosen_prior)
    elif len(z_image) != len(captions):
        raise InputError(f"expected one embedding per caption, got {len(z_image)} and {len(captions)}")
    static, scales = split_scales(sampler.options(options))
    key = ("text_to_image", chosen_prior, *static.items())
    run = sampler.program(key, lambda: _cascade(sampler, static, chosen_prior))
    arrays, empty = sampler.captions(captions), sampler.captions([""])
    given = None if z_image is None else np.asarray(z_image, np.float32)

    def batch(rows):
        texts, z, positions = sampler.rows((arrays, given, np.arange(len(captions), dtype=np.uint32)), rows)
        return run(sampler.params, scales, texts, empty, z, np.uint32(seed), positions)

    return Stages(*sampler.in_batches(batch, len(captions), progress))
