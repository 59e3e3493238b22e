"""Cascades that draw pixels from captions alone: a base network, and upsamplers that read the caption too.

GLIDE and its like differ in how captions are encoded. A `Cascade` says this; the functions here do the rest.
As in `unclip`, guidance scales are arguments of the program, and every row has its own random key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, upsamplers
from unclip_jax.data import ops
from unclip_jax.diffusion.process import fold_in
from unclip_jax.errors import InputError, MissingError
from unclip_jax.generate.captioned import eight_bits, sample_captioned
from unclip_jax.generate.decoder import Known
from unclip_jax.generate.denoise import Start
from unclip_jax.generate.networks import Network, image_size
from unclip_jax.generate.options import Options
from unclip_jax.generate.text import TextConditioning, Texts, encode_text
from unclip_jax.sampling.edits.img2img import STRENGTH, check_strength
from unclip_jax.sampling.edits.img2img import check_rows as check_pairs
from unclip_jax.sampling.edits.inpaint import check_rows, paste, shrink, square
from unclip_jax.sampling.edits.upscale import in_shapes, plan_of
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

Networks = Mapping[str, Network]


class Cascade(NamedTuple):
    """What distinguishes one such system.

    base: the part that draws from captions.
    parts: the parts that every bundle of the system has.
    encode: networks, arrays of `Sampler.captions` -> the captions' conditioning.
    tower: bundle -> the CLIP whose tokens `encode` takes; None for a text encoder that is not CLIP's.
    rounds: whether upsamplers see the small image in 256 levels, as in training.
    """

    base: str
    parts: tuple[str, ...]
    encode: Callable[[Networks, Mapping[str, jax.Array]], TextConditioning]
    tower: Callable[[Bundle], str | None] = lambda bundle: None
    rounds: bool = False


class CaptionedStages(NamedTuple):
    """What each stage drew, as NumPy arrays.

    images: one float array (B, H, W, 3) in [-1, 1] per size, that of the base network first.
    """

    images: list[np.ndarray]


def made_by(cascade: Cascade, bundle: Bundle, prior: None = None) -> list[str]:
    """The parts that make the images, the base network first."""
    return [cascade.base, *upsamplers(bundle.parts)]


def sizes(cascade: Cascade, bundle: Bundle) -> list[int]:
    """The sides in pixels of the pictures that the stages draw."""
    return [image_size(bundle.part(name).config) for name in made_by(cascade, bundle)]


def sample_stages(
    cascade: Cascade,
    bundle: Sampler | Bundle,
    captions: Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    positions: Sequence[int] | None = None,
    options: Overrides | Sequence[Overrides] = None,
    progress: Progress | None = None,
) -> CaptionedStages:
    """Runs the cascade and returns the output of every stage.

    Args:
      cascade: the system.
      bundle: with the system's parts, and any number of upsamplers.
      captions: at least one text. The tokenizer truncates texts that are too long.
      seed, positions, options, progress: as in `unclip.sample_stages`.

    Returns:
      The stages' arrays.

    Raises:
      ValueError: if there are no captions, or an option, the seed or a position is out of range.
      KeyError: if the bundle lacks a part.
      NumericalError: naming the first part that made values that are not finite.
    """
    sampler, captions = as_sampler(bundle), list(captions)
    for name in cascade.parts:
        sampler.bundle.part(name)
    made = made_by(cascade, sampler.bundle)
    known = (None,) * len(made)
    images = _draw(cascade, sampler, made, captions, known, seed, positions, options, progress)
    return CaptionedStages(images)


def inpaint_rows(
    cascade: Cascade,
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
) -> np.ndarray:
    """Draws the unknown parts of several images with the networks that were trained to inpaint.

    An upsampler with such a twin in the bundle leaves the enlarging to it.

    Args:
      images, masks, captions: as in `edits.inpaint.inpaint`, one per row.
      method: `trained`, or None. resamples: None.
      the others: as in `sample_stages`.

    Returns:
      uint8 (B, S, S, 3), as in `edits.inpaint.inpaint`.

    Raises:
      ValueError: as `sample_stages`; and for another method.
      KeyError: where the bundle has no network that inpaints.
    """
    sampler = as_sampler(bundle)
    images, masks, captions = check_rows(images, masks, captions)
    if method not in (None, "trained"):
        raise InputError(f"the system {sampler.bundle.system} inpaints by the method trained, not {method!r}")
    if resamples is not None:
        raise InputError("resamples is for the method resample, not for trained: leave it out")
    parts = sampler.bundle.parts
    if f"{cascade.base}_inpaint" not in parts:
        raise MissingError(
            f"the bundle {sampler.bundle.path or '(unsaved)'} has no part '{cascade.base}_inpaint', which "
            f"inpaints; it has {', '.join(parts)}"
        )
    made = made_by(cascade, sampler.bundle)
    made = [f"{name}_inpaint" if f"{name}_inpaint" in parts else name for name in made]
    known = []
    for name in made:
        side = image_size(parts[name].config)
        inpaints = sampler.network(name).module.inpaint
        shrunk = np.stack([shrink(mask, side) for mask in masks]) if inpaints else None
        known.append(Known(ops.to_float(square(images, side)), shrunk) if inpaints else None)
    drawn = _draw(cascade, sampler, made, captions, tuple(known), seed, positions, options, progress)
    return paste(ops.to_uint8(drawn[-1]), images, masks)


def img2img_rows(
    cascade: Cascade,
    bundle: Sampler | Bundle,
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    *,
    strength: float = STRENGTH,
    seed: int | Sequence[int] = 0,
    positions: Sequence[int] | None = None,
    options: Overrides | Sequence[Overrides] = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Draws pictures again from their noised copies, as `edits.img2img.img2img_rows`.

    Args:
      images, captions, strength: as there.
      the others: as in `sample_stages`.

    Returns:
      uint8 (B, S, S, 3).

    Raises:
      ValueError: as there.
      KeyError: if the bundle lacks a part.
    """
    sampler, captions = as_sampler(bundle), list(captions)
    check_pairs(images, captions)
    config = sampler.network(cascade.base).config
    check_strength(config, sampler.row_options(options, len(captions))[0][cascade.base], strength)
    start = ops.to_float(square(images, image_size(config)))
    made = made_by(cascade, sampler.bundle)
    drawn = _draw(
        cascade, sampler, made, captions, (None,) * len(made), seed, positions, options, progress,
        start=start, strength=strength,
    )  # fmt: skip
    return ops.to_uint8(drawn[-1])


def upscale_rows(
    cascade: Cascade,
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
    """Enlarges pictures with upsamplers that read their captions, as `edits.upscale.upscale_rows`.

    captions: one per picture; None means empty captions.
    """
    sampler, count = as_sampler(bundle), len(images)
    captions = [""] * count if captions is None else list(captions)
    seeds, places = as_seeds(seed, count), as_positions(positions, count)

    def draw(numbers: np.ndarray, batch: np.ndarray, names: list[str]) -> np.ndarray:
        return _draw(
            cascade, sampler, names, [captions[i] for i in numbers], (None,) * len(names),
            seeds[numbers].tolist(), places[numbers].tolist(), options, progress, given=batch,
        )[-1]  # fmt: skip

    return in_shapes(images, plan_of(sampler.bundle.parts, parts), draw)


def _draw(
    cascade: Cascade,
    sampler: Sampler,
    made: list[str],
    captions: Sequence[str],
    known: tuple[Known | None, ...],
    seed: int | Sequence[int],
    positions: Sequence[int] | None,
    options: Overrides | Sequence[Overrides],
    progress: Progress | None,
    *,
    given: np.ndarray | None = None,
    start: np.ndarray | None = None,
    strength: float = 1.0,
) -> list[np.ndarray]:
    # The images that the parts `made` draw, one after the other. `known` is what each of them keeps, `given`
    # the images (B, h, w, 3) that the first of them enlarges, and `start` those that it starts from with a
    # strength.
    count = len(captions)
    if not count:
        raise InputError("no captions: give at least one")
    seeds, places = as_seeds(seed, count), as_positions(positions, count)
    static, scales = split_scales(sampler.row_options(options, count))
    reads = cascade.tower(sampler.bundle)
    guides = _guiding_clip(sampler, static[made[0]], reads)
    tower = reads or guides

    def run(params, scales, captions, empty, known, given, start, seeds, positions):
        networks, chosen = sampler.with_params(params), with_scales(static, scales)
        keys, images = row_keys(seeds, positions), []
        texts = Texts(cascade.encode(networks, captions), cascade.encode(networks, empty))
        clip = None if guides is None else networks[guides]
        z_text = clip and encode_text(clip, captions).embed
        for i, (name, kept) in enumerate(zip(made, known)):
            low_res = images[-1] if images else given
            if images and cascade.rounds:
                low_res = eight_bits(low_res)
            begin = None if i or start is None else Start(start, strength)
            key = fold_in(keys, i)
            images.append(
                sample_captioned(
                    networks[name],
                    texts,
                    key,
                    chosen[name],
                    low_res=low_res,
                    known=kept,
                    start=begin,
                    clip=clip,
                    z_text=z_text,
                )  # fmt: skip
            )
        return images

    program = sampler.program(("captioned", strength, *made, *static.items()), lambda: run)
    arrays, empty = sampler.captions(captions, tower), sampler.captions([""], tower)

    def batch(rows):
        scale, texts, *more = sampler.rows((scales, arrays, known, given, start, seeds, places), rows)
        return program(sampler.params, scale, texts, empty, *more)

    return list(sampler.in_batches(batch, count, made, progress))


def _guiding_clip(sampler: Sampler, options: Options, reads: str | None) -> str | None:
    # The part that guides where the options ask for CLIP guidance: the CLIP that reads the captions, or else
    # a CLIP of noised images before another.
    if not options.clip_guidance:
        return None
    if reads is not None:
        return reads
    tower = next((name for name in ("noised_clip", "clip") if name in sampler.bundle.parts), None)
    if tower is None:
        raise InputError(
            f"clip_guidance needs a CLIP, and the bundle {sampler.bundle.path or '(unsaved)'} has none: add "
            "the part noised_clip or clip, or leave it out"
        )
    return tower
