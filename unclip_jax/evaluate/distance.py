"""The figures that papers print of generated images, between any two sets (`sets`).

| figure            | network    | images | whose protocol   | what it says                               |
|-------------------|------------|--------|------------------|--------------------------------------------|
| `fid`             | Inception  | 50,000 | Heusel 2017      | distance of two Gaussians, with sFID       |
| `fd-dinov2`       | DINOv2     | 50,000 | Stein 2023       | the same; agrees better with people        |
| `kid`             | Inception  | 1,000  | Binkowski 2018   | unbiased distance over subsets of 1,000    |
| `cmmd`            | CLIP       | 30,000 | Jayasumana 2024  | distance that assumes no Gaussian          |
| `prdc`            | Inception  | 10,000 | Naeem 2020       | quality and diversity apart                |
| `inception-score` | Inception  | 50,000 | Salimans 2016    | clear and varied classes; no reference     |
| `clip-score`      | CLIP       | 2      |                  | cosine of image and caption; no reference  |

The number of images is asked of the measured set, not of the reference. Fewer are an error, unless the
caller says `partial`: figures such as FID are biased, and grow as the sets get smaller. The CLIP score is a
plain mean, so that it takes any number of images; its interval says how much it can be trusted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

import unclip_jax
from unclip_jax.errors import InputError
from unclip_jax.evaluate.sets import Opened
from unclip_jax.evaluate.statistics import MOMENTS, POOL, SPATIAL, Recipe, Statistics, check_comparable
from unclip_jax.evaluate.streaming import PLAIN, Features, Preparation, image_features, text_features
from unclip_jax.metrics.clip_score import clip_score
from unclip_jax.metrics.cmmd import cmmd
from unclip_jax.metrics.fid import frechet_distance, frechet_distance_at_infinity, frechet_error
from unclip_jax.metrics.inception_score import inception_score
from unclip_jax.metrics.kid import kernel_inception_distance
from unclip_jax.metrics.mesh_moments import gather, mesh_update
from unclip_jax.metrics.moments import Moments, empty, moments, remarks
from unclip_jax.metrics.precision_recall import prdc
from unclip_jax.sharding import BATCH

LOGITS, TEXT = "logits", "text"
SUBSET = 1_000  # images of a subset of KID
SMALLEST = 5_000  # images of the smallest subset by which FID is extrapolated
ROWS = 1024  # features that are added to the moments at a time, about


class Value(NamedTuple):
    """A number, and how far it can be trusted.

    value: the number.
    error: what stands behind +-; None if there is none.
    low, high: an interval; None if there is none.
    kind: what the error or the interval is, in words.
    """

    value: float
    error: float | None = None
    low: float | None = None
    high: float | None = None
    kind: str = ""


class Settings(NamedTuple):
    """What changes how a figure is computed.

    infinity: whether the Fréchet distances are extrapolated to infinitely many images too.
    hessel: whether the CLIP score is 2.5 max(cosine, 0) (Hessel et al. 2021), and not the cosine.
    """

    infinity: bool = False
    hessel: bool = False


class Figure(NamedTuple):
    """One of the figures of the module's docstring.

    network: name of the default network.
    least: number of images asked of the measured set.
    source: whose protocol that is.
    reference: whether it compares with a reference.
    needs: outputs of the network whose features it reads.
    compute: (measured set, reference or None, settings) -> the numbers by name.
    """

    network: str
    least: int
    source: str
    reference: bool
    needs: tuple[str, ...]
    compute: Callable[[Statistics, Statistics | None, Settings], dict[str, Value]]


class Result(NamedTuple):
    """The numbers of a figure, and what was compared.

    figure: its name. values: the numbers by name. least: number of images asked for. partial: whether there
      were fewer.
    images, reference: what was compared; reference is None for a figure without one. notes: lines to print.
    """

    figure: str
    values: dict[str, Value]
    least: int
    partial: bool
    images: Statistics
    reference: Statistics | None
    notes: list[str]


# ------------------------------------------------------------------------------------------ figures
def _frechet(a: Statistics, b: Statistics | None, settings: Settings) -> dict[str, Value]:
    names = {POOL: "fid", SPATIAL: "sfid"} if a.recipe.network == "inception" else {POOL: "fd"}
    values = {
        name: Value(frechet_distance(a.moments[output], b.moments[output]))
        for output, name in names.items()
        if output in a.moments and output in b.moments
    }
    if POOL in a.features and len(a.features[POOL]) >= 2 * a.features[POOL].shape[1]:
        error = frechet_error(a.features[POOL], b.moments[POOL])
        main = values[names[POOL]]
        values[names[POOL]] = main._replace(error=error, kind="standard error by the delta method")
    if settings.infinity:
        if POOL not in a.features:
            raise InputError(f"{a.name} holds the mean and the covariance alone; --infinity needs its images")
        count = len(a.features[POOL])
        smallest = min(SMALLEST, count // 2)
        line = frechet_distance_at_infinity(a.features[POOL], b.moments[POOL], smallest=smallest)
        kind = (
            f"standard error by the delta method, and of a line through {len(line.rows)} subsets of "
            f"{smallest:,} to {count:,} images"
        )
        if smallest <= a.features[POOL].shape[1]:
            kind += "; not to be trusted, as the smallest has no more images than features"
        values[f"{names[POOL]}_infinity"] = Value(line.distance, line.error, kind=kind)
    return values


def _kid(a: Statistics, b: Statistics | None, settings: Settings) -> dict[str, Value]:
    size = min(SUBSET, len(a.features[POOL]), len(b.features[POOL]))
    found = kernel_inception_distance(a.features[POOL], b.features[POOL], subset_size=size)
    return {"kid": Value(found.mean, found.std, kind=f"standard deviation over 100 subsets of {size:,}")}


def _cmmd(a: Statistics, b: Statistics | None, settings: Settings) -> dict[str, Value]:
    return {"cmmd": Value(cmmd(a.features[POOL], b.features[POOL]))}


def _prdc(a: Statistics, b: Statistics | None, settings: Settings) -> dict[str, Value]:
    found = prdc(b.features[POOL], a.features[POOL])
    rates = {"precision": len(a.features[POOL])} | dict.fromkeys(
        ("recall", "coverage"), len(b.features[POOL])
    )
    return {
        name: _rate(value, rates[name]) if name in rates else Value(value)
        for name, value in found._asdict().items()
    }


def _rate(value: float, count: int) -> Value:
    # A bootstrap of `count` rows, of which the share `value` counts, draws binomial numbers.
    drawn = np.random.default_rng(0).binomial(count, value, 1000) / count
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Value(value, low=float(low), high=float(high), kind="95 % by bootstrap, both manifolds fixed")


def _inception_score(a: Statistics, b: Statistics | None, settings: Settings) -> dict[str, Value]:
    found = inception_score(a.features[LOGITS])
    return {"inception_score": Value(found.mean, found.std, kind="standard deviation over 10 parts")}


def _clip_score(a: Statistics, b: Statistics | None, settings: Settings) -> dict[str, Value]:
    found = clip_score(a.features[POOL], a.features[TEXT], hessel=settings.hessel)
    name = "clip_score_hessel" if settings.hessel else "clip_score"
    return {name: Value(found.mean, low=found.low, high=found.high, kind="95 % by bootstrap")}


FIGURES = {
    "fid": Figure("inception", 50_000, "Heusel et al. 2017", True, (), _frechet),
    "fd-dinov2": Figure("dinov2", 50_000, "Stein et al. 2023", True, (), _frechet),
    "kid": Figure("inception", SUBSET, "Binkowski et al. 2018", True, (POOL,), _kid),
    "cmmd": Figure("clip", 30_000, "Jayasumana et al. 2024", True, (POOL,), _cmmd),
    "prdc": Figure("inception", 10_000, "Naeem et al. 2020", True, (POOL,), _prdc),
    "inception-score": Figure(
        "inception", 50_000, "Salimans et al. 2016", False, (LOGITS,), _inception_score
    ),
    "clip-score": Figure("clip", 2, "a mean of pairs", False, (POOL, TEXT), _clip_score),
}


# ------------------------------------------------------------------------------------------ sets
def check_rows(name: str, count: int | None, partial: bool, what: str, least: int | None = None) -> bool:
    """Whether a set has fewer images than a figure asks for.

    Args:
      name: of the figure.
      count: number of images; None if a file does not say it.
      partial: whether fewer are allowed.
      what: what the message calls the set.
      least: number asked for; None means the figure's.

    Raises:
      ValueError: if there are fewer, or nobody knows, and `partial` is False; if there are fewer than two.
    """
    figure = FIGURES[name]
    least = figure.least if least is None else least
    if count is not None and count < 2:
        raise InputError(f"{name} needs at least two images, and {what} has {count}")
    if count is not None and count >= least:
        return False
    if not partial:
        has = "does not say how many images it describes" if count is None else f"has {count:,} images"
        raise InputError(
            f"{name} is measured on {least:,} images ({figure.source}), and {what} {has}: give more, or "
            "accept a partial figure with --partial"
        )
    return True


def needs_images(opened: Opened, name: str) -> bool:
    """Whether a figure has to compute the features of a set, as its file has not what the figure needs."""
    found, needs = opened.statistics, FIGURES[name].needs
    if found is None:
        return True
    if needs:
        return not all(output in found.features for output in needs)
    return not (found.moments or found.features)


def check_set(opened: Opened, name: str) -> None:
    """Raises a ValueError if a set lacks what a figure needs. It computes nothing."""
    if not needs_images(opened, name):
        return
    if opened.images is None:
        if FIGURES[name].needs != (POOL,):
            raise InputError(f"{opened.name} holds statistics, and {name} needs images: give the images")
        raise InputError(
            f"{opened.name} holds the mean and the covariance alone, and {name} needs the features: "
            f"save them with `unclip evaluate {name} --save-statistics`, or give the images"
        )
    if TEXT in FIGURES[name].needs and opened.images.captions is None:
        raise InputError(f"{opened.name} has no captions, which {name} compares the images with")


def check_network(network: Any, name: str) -> None:
    """Raises a ValueError if the weights of a network do not make what a figure needs."""
    needs = FIGURES[name].needs
    if LOGITS in needs and LOGITS not in network.outputs:
        raise InputError(
            f"{name} needs the classifier, which these weights of {network.name} lack: name a folder with "
            "pt_inception-2015-12-05-6726825d.pth by --weights"
        )
    if TEXT in needs:
        network.text([""])  # refuses weights without a text encoder


def planned(opened: Opened, name: str, recipe: Recipe | None) -> Statistics:
    """What is known of a set before its features are computed, for `check_comparable`.

    recipe: how a figure is going to compute features.
    """
    return Statistics(opened.name, recipe, None) if needs_images(opened, name) else opened.statistics


def describe(
    opened: Opened,
    name: str,
    network: Any,
    mesh: Mesh | None,
    *,
    preparation: Preparation = PLAIN,
    found: Features | None = None,
    **streaming: Any,
) -> tuple[Statistics, list[str]]:
    """What a figure needs to know of a set, from its file or computed from its images.

    Args:
      opened: the set.
      name: of the figure.
      network: a `features.FeatureNetwork`; None if `needs_images` is False.
      mesh: where moments are accumulated; None as with `network`.
      preparation: what is done to an image before the network.
      found: the features of the images, where the caller has them already.
      streaming: as `streaming.image_features`: work, batch, skip_bad, progress.

    Returns:
      The statistics, and notes to print.

    Raises:
      ValueError: if a file lacks what the figure needs; otherwise as `streaming.image_features`.
    """
    check_set(opened, name)
    figure = FIGURES[name]
    if not needs_images(opened, name):
        known = opened.statistics
        if not figure.needs and POOL not in known.moments:  # clean-fid's files for KID hold features alone
            return dataclasses.replace(known, moments={POOL: moments(known.features[POOL])}), []
        return known, []
    check_network(network, name)
    images = opened.images
    if found is None:
        found = image_features(network, images, preparation=preparation, **streaming)
    features, described = dict(found.outputs), {}
    if TEXT in figure.needs:
        features[TEXT] = text_features(network.text, images.captions([int(i) for i in found.rows]))
    if not figure.needs:
        described = {n: _accumulated(features[n], mesh) for n in MOMENTS if n in features}
    recipe = recipe_of(network, preparation)
    statistics = Statistics(images.name, recipe, len(found.rows), described, features, found.stored)
    return statistics, [f"{found.bad} images of {images.name} could not be used"] if found.bad else []


def recipe_of(network: Any, preparation: Preparation) -> Recipe:
    """How a network's features of prepared images are made, as statistics state it."""
    made = network.name, network.features_hash, network.resize
    return Recipe(*made, preparation.crop_words, preparation.codec_words)


def _accumulated(features: np.ndarray, mesh: Mesh) -> Moments:
    step, sums, split = mesh_update(mesh), empty(features.shape[1]), NamedSharding(mesh, BATCH)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = ways * max(1, ROWS // ways)  # every device gets as many
    for first in range(0, len(features), rows):
        block = np.asarray(features[first : first + rows])
        padded = np.zeros((rows, block.shape[1]), np.float32)
        padded[: len(block)] = block
        sums = step(sums, jax.device_put(padded, split), jax.device_put(np.arange(rows) < len(block), split))
    return moments(gather(sums))


def compare(
    name: str,
    images: Statistics,
    reference: Statistics | None,
    *,
    settings: Settings | None = None,
    partial: bool = False,
    notes: Sequence[str] = (),
    least: int | None = None,
) -> Result:
    """Computes a figure.

    Args:
      name: one of `FIGURES`.
      images: the measured set, from `describe`.
      reference: what it is compared with; None for a figure without reference.
      settings: what changes the computation; None for the defaults.
      partial: whether fewer images than the figure asks for are allowed.
      notes: further lines for the result.
      least: number of images asked for; None means the figure's.

    Raises:
      ValueError: if the sets were described differently, or have too few images; otherwise as the functions
        of `metrics`.
    """
    few = check_rows(name, images.count, partial, images.name, least)
    told = [*notes]
    if reference is not None:
        check_rows(name, reference.count, True, reference.name)
        told += check_comparable(images, reference)
    for side in (images, reference):
        if side is not None and POOL in side.moments:
            told += remarks(side.name, side.moments[POOL])
    values = FIGURES[name].compute(images, reference, settings or Settings())
    least = FIGURES[name].least if least is None else least
    return Result(name, values, least, few, images, reference, told)


# ------------------------------------------------------------------------------------------ words
def as_json(result: Result) -> dict:
    """A result as JSON values."""

    def of(statistics: Statistics) -> dict:
        recipe = dataclasses.asdict(statistics.recipe)
        return {
            "name": statistics.name,
            "count": statistics.count,
            "stored": list(statistics.stored),
        } | recipe

    return {
        "figure": result.figure,
        "values": {name: value._asdict() for name, value in result.values.items()},
        "partial": result.partial,
        "asked_images": result.least,
        "images": of(result.images),
        "reference": None if result.reference is None else of(result.reference),
        "notes": result.notes,
        "version": unclip_jax.__version__,
    }


def describe_result(result: Result) -> list[str]:
    """A result as lines: the numbers, what was compared and how, and notes."""
    count = "an unknown number of" if result.images.count is None else f"{result.images.count:,}"
    partial = f"  (partial: {count} of {result.least:,} images)" if result.partial else ""
    lines = [f"{name:18}{words(value)}{partial}" for name, value in result.values.items()]
    for what, statistics in (("images", result.images), ("reference", result.reference)):
        if statistics is not None:
            number = "unknown number" if statistics.count is None else f"{statistics.count:,}"
            lines.append(f"{what:18}{statistics.name}, {number}")
    return [*lines, f"{'features':18}{result.images.recipe.words()}", *(f"note: {n}" for n in result.notes)]


def words(value: Value) -> str:
    """A number with its error."""
    if value.error is not None:
        return f"{value.value:.4f} +- {value.error:.4f} ({value.kind})"
    if value.low is not None:
        return f"{value.value:.4f} [{value.low:.4f}, {value.high:.4f}] ({value.kind})"
    return f"{value.value:.4f}"
