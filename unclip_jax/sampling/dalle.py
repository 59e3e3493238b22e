"""DALL-E's cascade: caption, codes, image, in one compiled program; a CLIP ranks candidates.

Ramesh et al. 2021, section 2.6. `CASCADE` names DALL-E's parts; `dalle_mini` has a cascade of the same form.

As in `unclip`, guidance scales are arguments of the program, and every row has its own random key. Candidates
of a caption are rows with keys of their own, so that however many there are, a batch holds a few.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.data.tokenizer import warn_of_cuts
from unclip_jax.data.tokenizers import tokenizer_of
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import build_model
from unclip_jax.generate.options import Options
from unclip_jax.generate.tokens import sample_tokens
from unclip_jax.models.codec import cosine
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


class Cascade(NamedTuple):
    """The two parts that draw: the network of the codes, and the one that decodes them."""

    network: str
    coder: str


CASCADE = Cascade("dalle", "dvae")


class TokenStages(NamedTuple):
    """What each stage drew, as NumPy arrays, of the candidate that is kept.

    codes: (B, G, G) int32.
    images: [float array (B, H, W, 3) in [-1, 1]].
    scores: (B, candidates) cosines of picture and caption; None where nothing was ranked.
    """

    codes: np.ndarray
    images: list[np.ndarray]
    scores: np.ndarray | None


def made_by(bundle: Bundle, prior: None = None, *, cascade: Cascade = CASCADE) -> list[str]:
    """The names of the parts that draw."""
    return [*cascade, *(["clip"] if "clip" in bundle.parts else [])]


def sizes(bundle: Bundle, *, cascade: Cascade = CASCADE) -> list[int]:
    """The side in pixels of the picture that a bundle draws."""
    network, coder = (build_model(bundle.part(name).config) for name in cascade)
    return [network.side * coder.factor]


def sample_stages(
    bundle: Sampler | Bundle,
    captions: Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    positions: Sequence[int] | None = None,
    options: Overrides | Sequence[Overrides] = None,
    known: np.ndarray | None = None,
    progress: Progress | None = None,
    cascade: Cascade = CASCADE,
) -> TokenStages:
    """Runs the cascade and returns the output of every stage.

    Args:
      bundle: with the parts of the cascade, and a CLIP where candidates are ranked.
      captions: at least one text.
      seed, positions, options, progress: as in `unclip.sample_stages`.
      known: (B, R, G) int32, for each caption the codes of the upper R < G rows of its picture, which all
        candidates keep; None draws all rows. `edits.complete` takes them from a picture.

    Raises:
      ValueError: if there are no captions, or an option, the seed or a position is out of range; if `known`
        has another shape.
      KeyError: if the bundle lacks a part.
      NumericalError: naming the first part that made values that are not finite.
    """
    sampler, captions = as_sampler(bundle), list(captions)
    call, drawing = check_call(sampler, len(captions), seed, positions, options, cascade), cascade.network
    static, count = call.options, call.options[drawing].candidates
    if known is not None:
        _check_known(known, len(captions), sampler.network(drawing).module.side)
    tokenizer = sampler.once(
        ("tokenizer", drawing), lambda: tokenizer_of(sampler.bundle.part(drawing).config["tokenizer"])
    )
    warn_of_cuts(captions, tokenizer)
    of_captions, empty = (
        dict(zip(("tokens", "token_mask"), tokenizer(texts), strict=True))
        for texts in (captions, [""] * len(captions))
    )
    run = sampler.program((*cascade, *static.items()), lambda: _program(sampler, static, cascade))
    numbers = np.arange(len(captions) * count)  # a caption's candidates follow one another

    def batch(rows):
        of_row = rows // count
        given = sampler.rows((call.scales, of_captions, empty, call.seeds, call.positions, known), of_row)
        return run(sampler.params, *given, *sampler.rows((np.uint32(numbers % count),), rows))

    made = [drawing, *cascade]  # the codes are whole numbers, so a mark beside them shows damage
    codes, _, images = sampler.in_batches(batch, len(numbers), made, progress)
    images, scores = np.float32(images), None
    if count > 1:
        scores = rank(sampler, np.repeat(captions, count).tolist(), images).reshape(len(captions), count)
        best = np.arange(len(captions)) * count + np.argmax(scores, axis=1)
        codes, images = codes[best], images[best]
    return TokenStages(codes, [images], scores)


class Call(NamedTuple):
    """The checked arguments of a call of the cascade, for B captions.

    seeds, positions: (B,) uint32.
    options, scales: of the part that draws the codes, from `split_scales`.
    """

    seeds: np.ndarray
    positions: np.ndarray
    options: dict[str, Options]
    scales: dict[str, np.ndarray]


def check_call(
    sampler: Sampler,
    count: int,
    seed: int | Sequence[int],
    positions: Sequence[int] | None,
    options: Overrides | Sequence[Overrides],
    cascade: Cascade = CASCADE,
) -> Call:
    """Checks the arguments of `sample_stages` for `count` captions, before anything is compiled.

    Raises:
      ValueError, KeyError: as `sample_stages`.
    """
    if not count:
        raise InputError("no captions: give at least one")
    for name in cascade:
        sampler.bundle.part(name)
    seeds, places = as_seeds(seed, count), as_positions(positions, count)
    drawing = cascade.network
    static, scales = split_scales([{drawing: row[drawing]} for row in sampler.row_options(options, count)])
    candidates = static[drawing].candidates
    if candidates > 1 and "clip" not in sampler.bundle.parts:
        raise InputError(
            f"candidates={candidates} need a CLIP that ranks them, which this bundle lacks: set it to 1"
        )
    return Call(seeds, places, static, scales)


def _check_known(known: np.ndarray, count: int, side: int) -> None:
    shape = np.shape(known)
    if len(shape) != 3 or (shape[0], shape[2]) != (count, side) or not 0 < shape[1] < side:
        raise InputError(f"known codes must be ({count}, R, {side}) with R from 1 to {side - 1}, got {shape}")


def rank(sampler: Sampler, captions: Sequence[str], images: np.ndarray) -> np.ndarray:
    """The cosines (B,) of pictures (B, H, W, 3) in [-1, 1] and their captions, by the bundle's CLIP."""
    side = sampler.network("clip").config["model"]["image"]["image_size"]
    seen = ops.to_float(np.stack([ops.resize_then_crop(image, side) for image in ops.to_uint8(images)]))
    tokens, _ = sampler.tokenizer(captions)

    def make():
        def run(params, tokens, seen):
            clip = sampler.with_params(params)["clip"]
            text = clip.apply(tokens, method="encode_text").embed
            return cosine(text, clip.apply(seen, method="encode_image"))

        return run

    run = sampler.program(("codes", "rank"), make)
    batch = lambda rows: run(sampler.params, *sampler.rows((tokens, seen), rows))
    return np.asarray(sampler.in_batches(batch, len(images), ["clip"]))


def _program(sampler: Sampler, options: dict[str, Options], cascade: Cascade) -> Callable:
    def run(params, scales, captions, empty, seeds, positions, known, candidates):
        networks, chosen = sampler.with_params(params), with_scales(options, scales)
        keys = jax.vmap(jax.random.fold_in)(row_keys(seeds, positions), candidates)
        network, coder = (networks[name] for name in cascade)
        codes, finite = sample_tokens(network, captions, empty, keys, chosen[cascade.network], known)
        image = coder.apply(codes, method="decode_codes")
        return codes, jnp.where(finite, 0.0, jnp.nan), image

    return run
