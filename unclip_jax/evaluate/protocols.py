"""Protocols of papers: which captions a bundle draws, with which reference and which figures.

`sweep` measures a bundle at several guidance scales, as in figure 11 of unCLIP's paper. `coco30k` is the
protocol of GLIDE, DALL-E 2 and Karlo: 30,000 random captions of the validation set of MS-COCO 2014 are drawn,
and compared with all images of the set. Their short side is brought to 256 px, and the centre is cut out.

Karlo's authors published their figures at two numbers of steps (`EXPECTED`). Whoever has the weights, COCO
and CLIP B/16 can check that this package reaches them.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from unclip_jax.data.sources import make_source
from unclip_jax.errors import InputError
from unclip_jax.evaluate.distance import (
    FIGURES,
    Result,
    as_json,
    check_network,
    check_rows,
    check_set,
    compare,
    describe,
    planned,
    recipe_of,
)
from unclip_jax.evaluate.plot import Panel
from unclip_jax.evaluate.sets import Drawing, Opened, bundle_set, source_set
from unclip_jax.evaluate.statistics import check_comparable
from unclip_jax.evaluate.streaming import PLAIN, Features, Joined, Preparation, image_features
from unclip_jax.paths import user_path
from unclip_jax.sampling.programs import Sampler

COCO_ROWS = 30_000
COCO = Preparation("center", 256)


class Variant(NamedTuple):
    """One way in which a bundle draws.

    name: in tables. options: over those of the drawing, by part. scale: the guidance scale that it stands for
      in plots; None if it stands for none.
    """

    name: str
    options: Mapping[str, Mapping[str, Any]]
    scale: float | None = None


class Point(NamedTuple):
    """What was measured of a variant: the results by the figure's name."""

    variant: Variant
    results: dict[str, Result]

    def value(self, name: str) -> float | None:
        """A number by its name, e.g. "fid"; None if it was not measured."""
        found = [r.values[name].value for r in self.results.values() if name in r.values]
        return found[0] if found else None


class Expected(NamedTuple):
    """A published figure: what a variant must reach, and how far it may be away.

    variant: how the bundle draws. values: name -> (number, tolerance).
    """

    variant: Variant
    values: dict[str, tuple[float, float]]


def _karlo(steps: int, fid: float) -> Expected:
    options = {
        "prior_diffusion": {"steps": 25, "guidance_scale": 4.0},
        "decoder": {"steps": steps, "guidance_scale": 8.0},
        "upsampler_256": {"steps": 7},
    }
    # The authors do not name their captions, so that 30,000 others are drawn. The tolerances are ours.
    return Expected(Variant(f"{steps} steps", options), {"fid": (fid, 0.5), "clip_score": (0.3192, 0.003)})


# The published tables by name: the weights that they belong to, and the rows.
EXPECTED = {"karlo": (_karlo(25, 15.24), _karlo(50, 14.43))}


def guidance_variants(scales: Sequence[float], part: str = "decoder") -> list[Variant]:
    """A variant for each guidance scale of the part that draws (`System.draws`)."""
    return [Variant(f"{scale:g}", {part: {"guidance_scale": float(scale)}}, float(scale)) for scale in scales]


def measure(
    sampler: Sampler,
    drawing: Drawing,
    variants: Sequence[Variant],
    reference: Opened,
    figures: Sequence[str],
    open_network: Callable[[str], Any],
    mesh: Mesh,
    *,
    rows: int | None = None,
    partial: bool = False,
    preparation: Preparation = PLAIN,
    progress: Callable[[str], Callable[[int, int], None] | None] = lambda words: None,
    **streaming: Any,
) -> list[Point]:
    """Measures several variants of what a bundle draws. It draws each variant once, for all figures.

    Args:
      sampler: the bundle.
      drawing: what it draws, and the options that all variants share.
      variants: how it draws.
      reference: what figures with a reference compare with.
      figures: names of `FIGURES`.
      open_network: name -> the network.
      mesh: where moments are accumulated.
      rows: number of images that every figure asks for; None for its own.
      partial: whether fewer are allowed.
      preparation: what is done to all images first.
      progress: words -> a function of (images done, images in all).
      streaming: as `streaming.image_features`: work, batch, skip_bad.

    Raises:
      ValueError, KeyError: before anything is drawn, if there are too few captions, the bundle cannot draw
        so, or a network or the reference lacks what a figure needs or was made in another way; otherwise as
        `distance.describe` and `distance.compare`.
    """
    images = []
    for variant in variants:
        options = {part: dict(chosen) for part, chosen in drawing.options.items()}
        for part, chosen in variant.options.items():
            options[part] = options.get(part, {}) | dict(chosen)
        images.append(bundle_set(sampler, dataclasses.replace(drawing, options=options)))
    for name in figures:
        check_rows(name, len(drawing.captions), partial, "the list of captions", rows)
    networks = {kind: open_network(kind) for kind in dict.fromkeys(FIGURES[name].network for name in figures)}
    for name in figures:
        network = networks[FIGURES[name].network]
        check_network(network, name)
        if FIGURES[name].reference:
            check_set(reference, name)
            recipe = recipe_of(network, preparation)
            drawn = planned(Opened(images[0].name, images=images[0]), name, recipe)
            check_comparable(drawn, planned(reference, name, recipe))
    shared = {"preparation": preparation, **streaming}

    def described(opened: Opened, name: str, words: str, found: Features | None = None) -> tuple:
        network = networks[FIGURES[name].network]
        return describe(opened, name, network, mesh, progress=progress(words), found=found, **shared)

    compared = {
        name: described(reference, name, f"features of {reference.name}")
        for name in figures
        if FIGURES[name].reference
    }
    points, joined = [], Joined(dict(sorted(networks.items())))
    for variant, drawn in zip(variants, images):
        results, known, words = {}, {}, f"samples at {variant.name}"
        if len(networks) > 1:
            known = joined.split(image_features(joined, drawn, progress=progress(words), **shared))
        for name in figures:
            sampled = Opened(drawn.name, images=drawn)
            found, notes = described(sampled, name, words, known.get(FIGURES[name].network))
            other, told = compared.get(name, (None, []))
            results[name] = compare(name, found, other, partial=partial, notes=[*notes, *told], least=rows)
        points.append(Point(variant, results))
    return points


# ------------------------------------------------------------------------------------------ MS-COCO
def coco_captions(folder: str | os.PathLike, rows: int, seed: int) -> list[str]:
    """Random captions of val2014, in the order of the file.

    Args:
      folder: with `annotations/captions_val2014.json`, as MS-COCO is unpacked.
      rows: how many.
      seed: decides which.

    Raises:
      FileNotFoundError, ValueError: if the file is missing, damaged, or has too few captions.
    """
    path = user_path(folder) / "annotations" / "captions_val2014.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: unpack MS-COCO's annotations of 2014 into {folder}")
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["annotations"]
        captions = [" ".join(item["caption"].split()) for item in listed]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not MS-COCO's list of captions ({type(error).__name__})") from None
    if not 2 <= rows <= len(captions):
        raise InputError(f"{path} has {len(captions):,} captions, and {rows:,} are wanted")
    chosen = np.sort(np.random.default_rng(seed).choice(len(captions), rows, replace=False))
    return [captions[i] for i in chosen]


def coco_reference(folder: str | os.PathLike) -> Opened:
    """All images of val2014. Raises a FileNotFoundError if they are missing."""
    path = Path(user_path(folder)) / "val2014"
    if not path.is_dir():
        raise FileNotFoundError(f"no {path}: unpack MS-COCO's validation images of 2014 into {folder}")
    name = "val2014 of MS-COCO"
    return Opened(name, images=source_set(make_source({"name": "folder", "path": str(path)}), name))


# ------------------------------------------------------------------------------------------ words
def table(points: Sequence[Point], first: str) -> list[str]:
    """All numbers of all points as lines; `first` is the title of the first column."""
    named = dict.fromkeys(name for point in points for row in point.results.values() for name in row.values)
    widths = {name: max(12, len(name) + 2) for name in named}
    lines = [f"{first:14}" + "".join(f"{name:>{width}}" for name, width in widths.items())]
    for point in points:
        cells = ((point.value(name), width) for name, width in widths.items())
        words = (f"{'' if value is None else f'{value:.4f}':>{width}}" for value, width in cells)
        lines.append(f"{point.variant.name:14}" + "".join(words))
    few = [(name, r) for point in points for name, r in point.results.items() if r.partial]
    partial = [f"partial: {name}, {r.images.count:,} of {r.least:,} images" for name, r in few]
    lines += dict.fromkeys(partial)
    notes = [note for point in points for result in point.results.values() for note in result.notes]
    return [*lines, *(f"note: {note}" for note in dict.fromkeys(notes))]


def points_json(points: Sequence[Point]) -> list[dict]:
    """The points as JSON values."""
    return [
        {
            "variant": point.variant.name,
            "options": {part: dict(chosen) for part, chosen in point.variant.options.items()},
            "results": {name: as_json(result) for name, result in point.results.items()},
        }
        for point in points
    ]


def panels(points: Sequence[Point]) -> list[Panel]:
    """What `--plot` draws of a sweep over guidance: as far as it was measured,

    - FID over the guidance scale (unCLIP, figure 11);
    - FID against the CLIP score, which is the front between quality and fidelity to the caption;
    - precision against recall, which is the one between quality and diversity.
    """
    names = [point.variant.name for point in points]
    drawn = ("fid", "clip_score", "precision", "recall")
    columns = {name: [point.value(name) for point in points] for name in drawn}
    scales = [point.variant.scale for point in points]
    shown = []
    for title, x_name, x, y_name in (
        ("FID by guidance", "guidance scale", scales, "fid"),
        ("FID and CLIP score", "clip_score", columns["clip_score"], "fid"),
        ("Quality and diversity", "recall", columns["recall"], "precision"),
    ):
        y = columns[y_name]
        if None not in [*x, *y]:
            shown.append(Panel(title, x_name, y_name, x, y, names))
    return shown


def check_expected(points: Sequence[Point], name: str) -> list[str]:
    """Compares measured points with a published table.

    Returns:
      A line for each number.

    Raises:
      ValueError: naming the numbers that are further away than the tolerance.
    """
    lines, wrong = [], []
    for point, row in zip(points, EXPECTED[name], strict=True):
        for key, (number, tolerance) in row.values.items():
            found = point.value(key)
            line = f"{row.variant.name}: {key} {found:.4f}, published {number:g} (tolerance {tolerance:g})"
            lines.append(line)
            if not abs(found - number) <= tolerance:
                wrong.append(line)
    if wrong:
        raise InputError(f"the published figures of {name} are not reached: {'; '.join(wrong)}")
    return lines
