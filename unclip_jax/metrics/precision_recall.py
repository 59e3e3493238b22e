"""Precision, recall, density and coverage: fidelity and diversity apart, by balls around features.

A ball around a row reaches to its k-th nearest other row of its own set.

| figure    | share of              | that lie in                       | from                            |
|-----------|-----------------------|-----------------------------------|---------------------------------|
| precision | the samples           | the ball of any reference row     | Kynkaanniemi et al. 2019, k = 3 |
| recall    | the reference rows    | the ball of any sample            | the same                        |
| coverage  | the reference's balls | (that hold any sample)            | Naeem et al. 2020, k = 5        |

Density (Naeem et al. 2020) is the number of reference balls that a sample lies in, divided by k, on average.
It may exceed 1. An outlier in a set has a large ball, which raises precision and recall; density and coverage
suffer less from it.

A row on the edge of a ball lies inside for precision and recall, and outside for density and coverage, as in
the authors' programs. So a set without copies gives exactly 1 four times against itself. With more than k
copies of each row, density and coverage are 0, because every ball has the radius 0. ADM's evaluator and
torch-fidelity count the edge the same way for precision and recall; prdc counts it as outside for all four.
ADM's evaluator computes distances in float16 where that is finite, so its values may differ in the third
digit.

Distances come in blocks of one matrix product in float32. Where the bound of its rounding error leaves a
comparison open, the distance is computed anew from differences in float64. So the result does not depend on
rounding, and memory is that of the features in float32 and of one block.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

from unclip_jax.errors import InputError

_BLOCK = 2**24  # distances in a block
_PAIRS = 2**22  # values in a block of exact differences


class Prdc(NamedTuple):
    """precision, recall, coverage in [0, 1]; density at least 0."""

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(
    reference: np.ndarray, samples: np.ndarray, *, neighbours: int = 3, dense_neighbours: int = 5
) -> Prdc:
    """Precision, recall, density and coverage of samples against a reference.

    Precision and recall depend on the sizes of the sets. Compare only values of equal sizes.

    Args:
      reference: (N, D) features; may be memory-mapped.
      samples: (M, D) features; may be memory-mapped.
      neighbours: k of precision and recall.
      dense_neighbours: k of density and coverage.

    Raises:
      ValueError: when a set has no more rows than k, the widths differ, a feature is not finite, or a k is
        below 1.
    """
    for features in (reference, samples):
        if features.ndim != 2:
            raise InputError(f"features must be (N, D), got the shape {features.shape}")
    if reference.shape[1] != samples.shape[1]:
        raise InputError(
            f"the sets have features of different widths: {reference.shape[1]} and {samples.shape[1]}"
        )
    least = max(neighbours, dense_neighbours)
    if min(neighbours, dense_neighbours) < 1 or min(len(reference), len(samples)) <= least:
        raise InputError(
            f"a ball to the neighbour {least} needs more than {least} rows in each set, got {len(reference)} "
            f"and {len(samples)}; a neighbour is at least 1, got {neighbours} and {dense_neighbours}"
        )
    real, fake = _prepare(reference, samples)
    real_balls, dense_balls = _radii(real, (neighbours, dense_neighbours))
    (fake_balls,) = _radii(fake, (neighbours,))
    precise = np.zeros(len(samples), bool)
    recalled, covered = np.zeros(len(reference), bool), np.zeros(len(reference), bool)
    inside = 0
    for rows in _blocks(real, fake):
        balls = (real_balls[rows, None], fake_balls[None], dense_balls[rows, None])
        in_real, in_fake, in_dense = _inside(real, fake, rows, balls, (True, True, False))
        precise |= in_real.any(axis=0)
        recalled[rows] = in_fake.any(axis=1)
        covered[rows] = in_dense.any(axis=1)
        inside += int(np.count_nonzero(in_dense))
    return Prdc(
        precision=float(precise.mean()),
        recall=float(recalled.mean()),
        density=inside / (dense_neighbours * len(samples)),
        coverage=float(covered.mean()),
    )


# ------------------------------------------------------------------------------------------ distances
class _Rows(NamedTuple):
    # A set, moved and scaled so that float32 serves it well; `exact` times `scale` has its units.
    exact: np.ndarray  # (N, D), as given
    rough: np.ndarray  # (N, D) float32
    squares: np.ndarray  # (N,) float64, of the rough rows' norms
    same: np.ndarray  # (N,) int: equal for equal rows, also of the other set
    scale: float


def _prepare(*sets: np.ndarray) -> list[_Rows]:
    centre = np.mean(sets[0], axis=0, dtype=np.float64)
    largest, ids = 0.0, {}
    same = []
    for features in sets:
        numbers = np.empty(len(features), int)
        for i in range(len(features)):
            row = np.asarray(features[i], np.float64) + 0.0  # -0 and 0 are one
            if not np.isfinite(row).all():
                raise InputError("a feature is not finite")
            largest = max(largest, float(np.linalg.norm(row - centre)))
            digest = hashlib.blake2b(row.tobytes(), digest_size=16).digest()
            numbers[i] = ids.setdefault(digest, len(ids))
        same.append(numbers)
    scale = 1 / largest if largest else 1.0
    prepared = []
    for features, numbers in zip(sets, same):
        rough = np.empty(features.shape, np.float32)
        for first in range(0, len(features), 1024):
            rough[first : first + 1024] = (features[first : first + 1024] - centre) * scale
        squares = np.einsum("nd,nd->n", rough, rough, dtype=np.float64)
        prepared.append(_Rows(features, rough, squares, numbers, scale))
    return prepared


def _blocks(a: _Rows, b: _Rows) -> list[slice]:
    step = max(1, _BLOCK // len(b.rough))
    return [slice(first, first + step) for first in range(0, len(a.rough), step)]


def _bounds(a: _Rows, b: _Rows, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    # Bounds of the squared distances, float32. A product of D terms in float32 is wrong by at most
    # D u |x| |y| with u = 2^-24, in whatever order it is summed. 8 stands for the few other roundings.
    slack = (a.rough.shape[1] / 2 + 8) * 2.0**-23
    product = a.rough[rows] @ b.rough.T
    product *= -2
    sums = [
        ((1 + sign * slack) * squares).astype(np.float32)
        for sign in (-1, 1)
        for squares in (a.squares[rows, None], b.squares)
    ]
    lower = product + sums[1]
    lower += sums[0]
    product += sums[3]
    product += sums[2]
    return lower, product


def _exact(a: _Rows, b: _Rows, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    # Squared distances of pairs, float64, in scaled units: the same for (i, j) and (j, i), 0 for equal rows.
    distances, differ = np.zeros(len(i)), np.flatnonzero(a.same[i] != b.same[j])
    step = max(1, _PAIRS // a.rough.shape[1])
    for first in range(0, len(differ), step):
        pairs = differ[first : first + step]
        difference = np.asarray(a.exact[i[pairs]], np.float64) - b.exact[j[pairs]]
        distances[pairs] = np.einsum("nd,nd->n", difference, difference) * a.scale**2
    return distances


def _radii(a: _Rows, ks: tuple[int, ...]) -> list[np.ndarray]:
    # Squared distances to the k-th nearest other row, for each k: (N,) float64.
    radii, most = [np.empty(len(a.rough)) for _ in ks], max(ks)
    for rows in _blocks(a, a):
        lower, upper = _bounds(a, a, rows)
        # The row itself is nearest, so that the k-th neighbour has the place k.
        limit = np.partition(upper, most, axis=1)[:, most]
        i, j = np.nonzero(lower <= limit[:, None])
        distances = _exact(a, a, i + rows.start, j)
        order = np.lexsort((distances, i))
        starts = np.searchsorted(i, np.arange(len(limit)))
        for k, radius in zip(ks, radii):
            radius[rows] = distances[order][starts + k]
    return radii


def _inside(a: _Rows, b: _Rows, rows: slice, balls: tuple, edges: tuple) -> list[np.ndarray]:
    # For each array of squared radii, (n, 1) or (1, M): whether a pair is nearer, or as near where the edge
    # counts: (n, M) bool.
    lower, upper = _bounds(a, b, rows)
    surely = [upper < ball for ball in balls]
    open_ = np.zeros(lower.shape, bool)
    for ball, sure in zip(balls, surely):
        open_ |= (lower <= ball) & ~sure
    i, j = np.nonzero(open_)
    distances = _exact(a, b, i + rows.start, j)
    for ball, edge, sure in zip(balls, edges, surely):
        radius = np.broadcast_to(ball, lower.shape)[i, j]
        sure[i, j] = distances <= radius if edge else distances < radius
    return surely
