"""VQ-VAE-2's cascade: top codes, bottom codes, image, in one compiled program (Razavi et al. 2019).

As in `unclip`, guidance scales are arguments of the program, and every row has its own random key. The priors
see the captions if the bundle has a CLIP. Without one, every caption draws from the whole distribution.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part
from unclip_jax.diffusion.process import fold_in
from unclip_jax.errors import InputError
from unclip_jax.generate.options import Options
from unclip_jax.generate.text import Texts, encode_text
from unclip_jax.generate.tokens import sample_grid
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

log = logging.getLogger(__name__)
PARTS = ("pixelsnail_0", "vqvae")  # of every bundle; those of two levels have pixelsnail_1, and so on


class GridStages(NamedTuple):
    """What each stage drew, as NumPy arrays.

    codes: for each level (B, h, w) int32, the bottom's first.
    images: [float array (B, H, W, 3), about [-1, 1]].
    """

    codes: list[np.ndarray]
    images: list[np.ndarray]


def priors(bundle: Bundle) -> list[str]:
    """The names of a bundle's priors, the bottom's first: one for each level of its VQ-VAE."""
    levels = bundle.part("vqvae").config["model"].get("levels", 2)
    return [f"pixelsnail_{level}" for level in range(levels)]


def made_by(bundle: Bundle, prior: None = None) -> list[str]:
    """The names of the parts that draw."""
    clip = ["clip"] if "clip" in bundle.parts else []
    return [*clip, *reversed(priors(bundle)), "vqvae"]


def needs(parts: Mapping[str, Part]) -> tuple[str, ...]:
    """The parts that training runs must give for a bundle: all priors of the VQ-VAE that is there, or of one
    of two levels."""
    return ("vqvae", *(priors(Bundle(dict(parts))) if "vqvae" in parts else ("pixelsnail_0", "pixelsnail_1")))


def sizes(bundle: Bundle) -> list[int]:
    """The side in pixels of the picture that a bundle draws."""
    halvings = bundle.part("vqvae").config["model"].get("halvings", 2)
    return [bundle.part("pixelsnail_0").config["model"]["side"] * 2**halvings]


def sample_stages(
    bundle: Sampler | Bundle,
    captions: Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    positions: Sequence[int] | None = None,
    options: Overrides | Sequence[Overrides] = None,
    progress: Progress | None = None,
) -> GridStages:
    """Runs the cascade and returns the output of every stage.

    Args:
      bundle: with a VQ-VAE and a prior for each of its levels; a CLIP if the priors see captions.
      captions: at least one text.
      seed, positions, options, progress: as in `unclip.sample_stages`.

    Raises:
      ValueError: if there are no captions, or an option, the seed or a position is out of range.
      KeyError: if the bundle lacks a part.
      NumericalError: naming the first part that made values that are not finite.
    """
    sampler, captions = as_sampler(bundle), list(captions)
    if not captions:
        raise InputError("no captions: give at least one")
    seeds, places = as_seeds(seed, len(captions)), as_positions(positions, len(captions))
    names = priors(sampler.bundle)
    models = [sampler.bundle.part(name).config["model"] for name in names]
    seeing = any(model.get("text_dim") is not None for model in models)
    if seeing:
        sampler.bundle.part("clip")
        arrays = (sampler.captions(captions), sampler.captions([""] * len(captions)))
    else:
        arrays = ()
        if any(captions):
            log.warning("the priors of this bundle see no captions: they draw whatever they were trained on")
    static, scales = split_scales(sampler.row_options(options, len(captions)))
    run = sampler.program(("vqvae2", *static.items()), lambda: _cascade(sampler, static, names))

    def batch(rows):
        scale, texts, numbers, where = sampler.rows((scales, arrays, seeds, places), rows)
        return run(sampler.params, scale, texts, numbers, where)

    # Codes are whole numbers, so each level's logits are checked by a mark beside its codes.
    made = [name for name in names for _ in range(2)]
    codes, image = sampler.in_batches(batch, len(captions), [*made, "vqvae"], progress)
    return GridStages([of_level for of_level, _ in codes], [np.float32(image)])


def _cascade(sampler: Sampler, options: dict[str, Options], names: list[str]) -> Callable:
    def run(params, scales, captions, seeds, positions):
        networks, chosen = sampler.with_params(params), with_scales(options, scales)
        keys = row_keys(seeds, positions)
        texts = None
        if captions:
            full, empty = (encode_text(networks["clip"], each) for each in captions)
            texts = Texts(full, empty)
        drawn, coarse = [], None
        for level, name in reversed(list(enumerate(names))):
            prior = networks[name]
            given = {"texts": texts} if prior.module.text_dim is not None else {}
            codes, finite = sample_grid(prior, fold_in(keys, level), chosen[name], coarse=coarse, **given)
            drawn.append((codes, jnp.where(finite, 0.0, jnp.nan)))
            coarse = codes
        drawn.reverse()
        image = networks["vqvae"].apply([codes for codes, _ in drawn], method="decode_codes")
        return drawn, image

    return run
