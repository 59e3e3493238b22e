"""The mean and the covariance of features, in float64, from one array or from a stream.

A stream keeps `Sums`: the number of rows n, their mean m, and the scatter S, which is the sum of the outer
products of (x - m). Two of them are joined as Chan, Golub and LeVeque (1979) do it:

    d = m_b - m_a
    m = m_a + d n_b / n
    S = S_a + S_b + d d^T n_a n_b / n

Sums of x x^T would lose digits where the mean is large beside the deviation. This form loses none.
`mesh_moments` does the same for features on a mesh.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from unclip_jax.errors import InputError

_ROWS = 4096  # rows of a block in float64


class Moments(NamedTuple):
    """What the Fréchet distance needs of a set of features.

    count: number of rows N, or None where a file of statistics does not say. mean: (D,) float64.
    cov: (D, D) float64, the unbiased covariance, divided by N - 1.
    """

    count: int | None
    mean: np.ndarray
    cov: np.ndarray


class Sums(NamedTuple):
    """Running sums of rows. count: N. mean: (D,) float64. scatter: (D, D) float64, (x - mean)(x - mean)^T."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray


def empty(width: int) -> Sums:
    """The sums of no rows of width D."""
    return Sums(0, np.zeros(width), np.zeros((width, width)))


def merge(a: Sums, b: Sums) -> Sums:
    """The sums of the rows of both.

    Raises:
      ValueError: when the widths differ.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(f"cannot join features of the widths {len(a.mean)} and {len(b.mean)}")
    if not a.count or not b.count:
        return a if a.count else b
    count, shift = a.count + b.count, b.mean - a.mean
    outer = np.outer(shift, shift) * (a.count * b.count / count)
    return Sums(count, a.mean + shift * (b.count / count), a.scatter + b.scatter + outer)


def update(sums: Sums, features: np.ndarray) -> Sums:
    """The sums with further rows. A large array is read in blocks, so it may be memory-mapped.

    Args:
      features: (N, D) of any float type; N may be 0.

    Raises:
      ValueError: when the array is not (N, D) of the width of the sums, or a feature is not finite.
    """
    if features.ndim != 2 or features.shape[1:] != sums.mean.shape:
        raise InputError(f"features must be (N, {len(sums.mean)}), got the shape {features.shape}")
    for first in range(0, len(features), _ROWS):
        block = np.asarray(features[first : first + _ROWS], np.float64)
        if not np.isfinite(block).all():
            raise InputError("a feature is not finite")
        mean = block.mean(axis=0)
        centred = block - mean
        sums = merge(sums, Sums(len(block), mean, centred.T @ centred))
    return sums


def moments(features: np.ndarray | Sums) -> Moments:
    """Mean and covariance of (N, D) features, or of running sums.

    Raises:
      ValueError: when there are fewer than two rows, the array is not (N, D), or a feature is not finite.
    """
    if isinstance(features, Sums):
        sums = features
    elif features.ndim != 2:
        raise InputError(f"features must be (N, D), got the shape {features.shape}")
    else:
        sums = update(empty(features.shape[1]), features)
    if sums.count < 2:
        raise InputError(f"a covariance needs at least two rows of features, got {sums.count}")
    return Moments(sums.count, sums.mean, sums.scatter / (sums.count - 1))


def remarks(name: str, stats: Moments) -> list[str]:
    """What a reader should know before he trusts a Fréchet distance of this set, one line each.

    Args:
      name: what the line calls the set.
    """
    count, width = stats.count, len(stats.mean)
    if np.diagonal(stats.cov).max() <= 1e-20 * np.max(stats.mean**2):  # equal up to rounding
        return [f"{name}: all rows of features are equal, so the covariance is zero"]
    if count is not None and count <= width:
        return [
            f"{name}: {count} rows of {width} features give a singular covariance, and other programs may "
            f"disagree in the distance; use more than {width} rows"
        ]
    return []
