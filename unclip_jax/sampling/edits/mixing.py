"""Mixtures of pictures and captions: a weighted sum of their image embeddings (as Kandinsky's users do it).

A picture's embedding is CLIP's, and a caption's is drawn by the prior. The decoder draws for the sum, which
is not normalised: weights that add up to 1 keep it in the range that the decoder was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.errors import InputError
from unclip_jax.sampling.edits.coders import coder_of
from unclip_jax.sampling.edits.inversion import embed_images
from unclip_jax.sampling.programs import (
    Progress,
    Sampler,
    as_positions,
    as_sampler,
    as_seeds,
    row_keys,
    split_scales,
    with_scales,
)
from unclip_jax.sampling.unclip import PRIORS, check_prior, draw_z_image, encode_captions


def caption_embeddings(
    sampler: Sampler,
    captions: Sequence[str],
    *,
    prior: str = "prior_diffusion",
    seed: int = 0,
    positions: Sequence[int] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> np.ndarray:
    """Raw image embeddings (B, D) of captions, drawn with a prior; arguments as in `unclip.sample_stages`.

    Raises:
      ValueError, KeyError: as `unclip.sample_stages`.
    """
    check_prior(sampler.bundle, prior)
    count, used = len(captions), PRIORS[prior]
    seeds, places = as_seeds(seed, count), as_positions(positions, count)
    rows = sampler.row_options(options, count)
    static, scales = split_scales([{name: row[name] for name in used if name in row} for row in rows])

    def make():
        def run(params, scales, captions, empty, seeds, positions):
            networks, chosen = sampler.with_params(params), with_scales(static, scales)
            texts = encode_captions(networks["clip"], captions, empty)
            z_image = draw_z_image(prior, networks, texts, row_keys(seeds, positions), chosen)
            return jnp.zeros_like(texts.captions.embed) if z_image is None else z_image

        return run

    run = sampler.program(("caption_embeddings", prior, *static.items()), make)
    given, empty = (scales, sampler.captions(captions), seeds, places), sampler.captions([""])

    def batch(index):
        scale, texts, numbers, where = sampler.rows(given, index)
        return run(sampler.params, scale, texts, empty, numbers, where)

    return sampler.in_batches(batch, count, [*used, "clip"][:1])


def mix(
    bundle: Sampler | Bundle,
    items: Sequence[np.ndarray | str],
    weights: Sequence[float] | None = None,
    *,
    count: int = 6,
    prior: str = "prior_diffusion",
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Draws pictures of a mixture of pictures and captions.

    Args:
      bundle: of a system with image embeddings (`coders.CODERS`); with a prior, if a caption is mixed.
      items: pictures, uint8 (H, W, 3), and captions; at least one.
      weights: a number for each item, not all of them zero; None for equal ones that add up to 1.
      count: number of pictures, each with noise of its own in prior and decoder.
      prior: draws the captions' embeddings.
      seed, options, progress: as in `unclip.sample_stages`.

    Returns:
      uint8 (count, H, W, 3).

    Raises:
      ValueError: if there are no items, the weights do not fit them, an item is neither a picture nor a
        caption, or an option is out of range.
      KeyError: if the bundle lacks a part.
    """
    sampler = as_sampler(bundle)
    coder = coder_of(sampler)
    if not len(items):
        raise InputError("nothing to mix: give at least one picture or caption")
    if count < 1:
        raise InputError(f"the number of pictures must be at least 1, got {count}")
    weights = np.full(len(items), 1 / len(items)) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != (len(items),):
        raise InputError(f"expected a weight for each of {len(items)} items, got {weights.tolist()}")
    if not np.isfinite(weights).all() or not weights.any():
        raise InputError(f"the weights must be finite numbers, not all zero, got {weights.tolist()}")
    sampler.options(options)
    mixture: Any = 0.0
    for item, weight in zip(items, weights):
        if isinstance(item, str):
            z = caption_embeddings(sampler, [item] * count, prior=prior, seed=seed, options=options)
        else:
            z = np.repeat(embed_images(sampler, [item]), count, axis=0)
        mixture = mixture + np.float32(weight) * z
    stages = coder.sample(
        sampler, [""] * count, z_image=mixture, seed=seed, options=options, progress=progress
    )
    return ops.to_uint8(stages.images[-1])
