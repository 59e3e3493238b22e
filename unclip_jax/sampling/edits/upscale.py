"""Upscaling: a bundle's upsamplers enlarge pictures of any size (unCLIP section 2.1).

An upsampler without attention sees a neighbourhood only, so it enlarges pictures of other sizes than its own.
Pictures whose sides do not fit its levels are continued at their lower and right edges by reflection, and the
result is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle, Part, last_step, upsamplers
from unclip_jax.data import ops
from unclip_jax.errors import InputError
from unclip_jax.sampling.programs import (
    MAX_BATCH,
    Overrides,
    Progress,
    Sampler,
    as_positions,
    as_sampler,
    as_seeds,
    row_keys,
)
from unclip_jax.sampling.unclip import enlarge

LARGEST_SIDE = 8192  # of a result, in pixels


def chain(parts: Mapping[str, Part], sides: tuple[int, int], names: Sequence[str] | None = None) -> list[str]:
    """The upsamplers that enlarge a picture, one after another.

    Args:
      parts: of a bundle.
      sides: (height, width) of the picture.
      names: those to take, in any order. None means the first one whose small images are at least as large
        as the picture's longer side, and all after it; or the last one alone.

    Raises:
      ValueError: if there are none, or a name is none of them.
    """
    found = upsamplers(parts)
    if not found:
        raise InputError(f"the bundle has no upsampler; it has {', '.join(parts)}")
    for name in names or ():
        if name not in found:
            raise InputError(f"{name} is no upsampler of the bundle; choose of {', '.join(found)}")
    if names:
        return [name for name in found if name in names]
    small = [_image_size(parts[name]) // parts[name].config["factor"] for name in found]
    return found[next((i for i, side in enumerate(small) if side >= max(sides)), len(found) - 1) :]


def factor(parts: Mapping[str, Part], names: Sequence[str]) -> int:
    """How many times larger the upsamplers `names` make a picture in all."""
    return math.prod(parts[name].config["factor"] for name in names)


def padding(parts: Mapping[str, Part], names: Sequence[str], sides: tuple[int, int]) -> tuple[int, int]:
    """How many rows and columns a picture lacks until the upsamplers `names` can halve it at all levels."""
    multiple, scale = 1, 1
    for name in names:
        scale *= parts[name].config["factor"]
        levels = len(parts[name].config["model"]["unet"]["channel_mult"])
        # An efficient U-Net halves at its first level too.
        halved = 2 ** (levels if parts[name].config["kind"] == "imagen_upsampler" else levels - 1)
        multiple = math.lcm(multiple, halved // math.gcd(halved, scale))
    return -sides[0] % multiple, -sides[1] % multiple


def _image_size(part: Part) -> int:
    return part.config["model"]["unet"]["image_size"]


class Plan(NamedTuple):
    """How a picture is enlarged.

    names: the parts that do it, one after another. factor: how many times larger the result is. lacks: the
    rows and columns that the picture lacks for them.
    """

    names: list[str]
    factor: int
    lacks: tuple[int, int]


def plan_of(parts: Mapping[str, Part], names: Sequence[str] | None) -> Callable[[tuple[int, int]], Plan]:
    """(height, width) of a picture -> how the upsamplers `names` (see `chain`) enlarge it."""

    def plan(sides: tuple[int, int]) -> Plan:
        chosen = chain(parts, sides, names)
        return Plan(chosen, factor(parts, chosen), padding(parts, chosen, sides))

    return plan


def in_shapes(
    images: Sequence[np.ndarray],
    plan: Callable[[tuple[int, int]], Plan],
    draw: Callable[[np.ndarray, np.ndarray, list[str]], np.ndarray],
) -> Iterator[tuple[int, np.ndarray]]:
    """Enlarges pictures of several sizes, those of one size together.

    Args:
      images: uint8 (H, W, 3).
      plan: (height, width) of a picture -> how it is enlarged.
      draw: (numbers of B pictures, the pictures (B, h, w, 3) in [-1, 1], parts) ->
        (B, H, W, 3) in [-1, 1].

    Yields:
      The number of a picture, and its result, uint8.

    Raises:
      ValueError: if there are no pictures, one is not uint8 (H, W, 3), or a result would be too large.
    """
    groups: dict[tuple, list[int]] = {}
    if len(images) == 0:
        raise InputError("no images: give at least one")
    for i, image in enumerate(images):
        if np.ndim(image) != 3 or np.shape(image)[2] != 3 or np.asarray(image).dtype != np.uint8:
            kind = f"{np.asarray(image).dtype} {np.shape(image)}"
            raise InputError(f"images must be uint8 (H, W, 3), got {kind}")
        sides = image.shape[:2]
        scale = plan(sides).factor
        if max(sides) * scale > LARGEST_SIDE:
            size = f"{sides[1] * scale}x{sides[0] * scale}"
            raise InputError(
                f"{scale} times a picture of {sides[1]}x{sides[0]} is {size}; the most is {LARGEST_SIDE} "
                "pixels a side: shrink it, or name one upsampler"
            )
        groups.setdefault(sides, []).append(i)
    for (height, width), numbers in groups.items():
        chosen, scale, more = plan((height, width))
        batch = ops.to_float(np.stack([images[i] for i in numbers]))
        for axis, missing in enumerate(more, 1):
            # `reflect` needs as many pixels as it adds; a narrow picture repeats its last one.
            mode = "reflect" if missing < batch.shape[axis] else "edge"
            batch = np.pad(batch, [(0, missing if axis == at else 0) for at in range(4)], mode)
        drawn = ops.to_uint8(draw(np.array(numbers), batch, chosen)[:, : height * scale, : width * scale])
        yield from zip(numbers, drawn)


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
    """Enlarges pictures with upsamplers that read no caption.

    Args:
      bundle: with at least one upsampler.
      images: uint8 (H, W, 3), any sizes.
      captions: None; these upsamplers read none.
      parts: names of upsamplers; None chooses (`chain`).
      seed, positions, options: as in `unclip.sample_stages`.
      progress: called with (pictures done, total pictures) for the pictures of each size.

    Yields:
      The number of a picture, and the result, uint8 (factor * H, factor * W, 3).

    Raises:
      ValueError: if an input is not an image, a name is no upsampler, or an option is out of range.
    """
    sampler, count = as_sampler(bundle), len(images)
    held = sampler.bundle.parts
    if captions is not None:
        raise InputError("these upsamplers read no caption: leave it out")
    seeds, places = as_seeds(seed, count), as_positions(positions, count)
    chosen: dict[str, Any] = sampler.options(options)

    def draw(numbers: np.ndarray, batch: np.ndarray, names: list[str]) -> np.ndarray:
        used = {name: chosen[name] for name in names}
        # `enlarge` runs all upsamplers that it is given.
        own = {name: held[name] for name in (*names, *(last_step(held, name) for name in names)) if name}

        def make():
            def run(params, image, seeds, positions):
                keys = row_keys(seeds, positions)
                return enlarge(own, sampler.with_params(params), image, keys, used)[-1]

            return run

        run = sampler.program(("upscale", batch.shape[1:], *used.items()), make)
        given = (batch, seeds[numbers], places[numbers])
        rows = lambda rows: run(sampler.params, *sampler.rows(given, rows))
        # Large pictures go through one by one, so that memory stays that of a batch of 1024 px.
        pixels = batch.shape[1] * batch.shape[2] * factor(held, names) ** 2
        most = min(max(MAX_BATCH * 1024**2 // pixels, 1), MAX_BATCH)
        return sampler.in_batches(rows, len(numbers), [names[-1]], progress, most)

    return in_shapes(images, plan_of(held, parts), draw)
