"""The Fréchet distance between two sets of features (Heusel et al. 2017): FID, with any feature network.

Each set is described by the mean and the covariance of its features. The distance is

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

With Inception's pooled features (2048) it is FID. With its spatial features (2023) it is sFID (Nash et al.
2021). With DINOv2's it is FD-DINOv2 (Stein et al. 2023).

With C_a = F_a F_a^T and C_b = F_b F_b^T, the trace of (C_a C_b)^(1/2) is the sum of the singular values of
F_a^T F_b. Their rounding error is a share of the largest one, also when a covariance is singular. Where a set
has no more rows than features, its centred rows divided by the root of N - 1 are such an F, and no matrix of
D x D is taken apart.
pytorch-fid and ADM's evaluator take a matrix square root of C_a C_b, and torch-fidelity takes the square
roots of that matrix's eigenvalues. All agree where both covariances have full rank. Where one is singular (no
more rows than features, N <= D), the product has many eigenvalues that are zero up to rounding. The
references then add up the square roots of rounding errors, and the distance of a set to itself may be
negative. The error is small either way: 500 rows of 2048 features differ from torch-fidelity by 1e-4 in 1895.

FID is biased: it grows as a set gets smaller. Compare only values of sets of equal sizes, or use
`frechet_distance_at_infinity`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from unclip_jax.errors import InputError
from unclip_jax.metrics.moments import Moments, moments

Set = np.ndarray | Moments


def frechet_distance(a: Set, b: Set) -> float:
    """The Fréchet distance between two sets of features, at least 0.

    Args:
      a: (N, D) features, or their moments.
      b: (M, D) features, or their moments.

    Raises:
      ValueError: when a set has fewer than two rows, the widths differ, or a feature is not finite.
    """
    a, b = _gaussian(a), _gaussian(b)
    _check_widths(len(a.mean), len(b.mean))
    return _distance(a, b)


def frechet_error(features: np.ndarray, reference: Set) -> float:
    """The standard error of `frechet_distance` over draws of the samples, by the delta method.

    One more row x changes the distance by 1 / N times

        2 (mu - mu_r) . (x - mu) + (x - mu)^T (I - T) (x - mu) + a constant

    where T = C^(-1/2) (C^(1/2) C_r C^(1/2))^(1/2) C^(-1/2) is the matrix that carries the samples' Gaussian
    to the reference's: the derivative of the trace of the root by C is T / 2. The standard deviation of this
    over the rows, divided by the root of N, is the error. On draws of Gaussians it is the deviation of the
    distance within a third. It contains neither the bias of the distance nor the error of the reference.

    Args:
      features: (N, D), the samples, with N well above D; may be memory-mapped.
      reference: (M, D) features, or their moments.

    Raises:
      ValueError: as `frechet_distance`.
    """
    own, reference = moments(np.asanyarray(features)), _as_moments(reference)
    _check_widths(len(own.mean), len(reference.mean))
    values, vectors = np.linalg.eigh(own.cov)
    values = _significant(values)
    root = (vectors * np.sqrt(values)) @ vectors.T
    inverse = (vectors * np.where(values > 0, 1 / np.sqrt(np.where(values > 0, values, 1)), 0)) @ vectors.T
    matrix = np.eye(len(values)) - inverse @ _root(root @ reference.cov @ root) @ inverse
    influence = np.empty(len(features))
    for first in range(0, len(features), 4096):
        rows = np.asarray(features[first : first + 4096], np.float64) - own.mean
        influence[first : first + 4096] = 2 * rows @ (own.mean - reference.mean) + np.einsum(
            "nd,nd->n", rows @ matrix, rows
        )
    return float(influence.std(ddof=1) / np.sqrt(len(influence)))


class Extrapolated(NamedTuple):
    """distance: the value for infinitely many samples. error: its standard error.

    rows: (P,) int, sizes of the subsets. distances: (P,) float64, the distance of each.
    """

    distance: float
    error: float
    rows: np.ndarray
    distances: np.ndarray


def frechet_distance_at_infinity(
    features: np.ndarray, reference: Set, *, points: int = 15, smallest: int = 5000, seed: int = 0
) -> Extrapolated:
    """FID at infinity (Chong and Forsyth 2020): the distance without the bias of a finite set of samples.

    The distance of N samples is nearly linear in 1 / N. Random subsets of `points` sizes, evenly spaced from
    `smallest` to all N, are compared with the reference, and a straight line through the distances is
    followed to 1 / N = 0. The reference stays whole: its own bias remains, so compare only values with the
    same reference.

    The standard error joins two parts: that of the line's intercept, and `frechet_error`, which is how much
    the distance varies between sets of N samples. The first alone is too small, since the subsets share rows:
    on draws of Gaussians the limit varied 2 to 2.7 times as much as it says, and 0.8 to 1.2 times as much as
    the joined error.

    Args:
      features: (N, D), the samples.
      reference: (M, D) features, or their moments.
      points: number of subsets P, at least 3.
      smallest: rows of the smallest subset, at least 2 and below N. Take more than D.
      seed: random seed of the subsets.

    Raises:
      ValueError: as `frechet_distance`, or when an option is out of its range.
    """
    reference = _as_moments(reference)
    features = np.asanyarray(features)
    if features.ndim != 2 or not 2 <= smallest < len(features) or points < 3:
        raise InputError(
            f"FID at infinity needs at least 3 subsets, and more samples than its smallest subset has: got "
            f"{points} subsets from {smallest} rows, and features of the shape {features.shape}"
        )
    _check_widths(features.shape[1], len(reference.mean))
    far, rng = _gaussian(reference), np.random.default_rng(seed)
    rows = np.linspace(smallest, len(features), points).astype(int)
    distances = np.array(
        [_distance(_gaussian(features[np.sort(rng.permutation(len(features))[:n])]), far) for n in rows]
    )
    x = 1 / rows
    slope, intercept = np.polyfit(x, distances, 1)
    spread = np.sum((x - x.mean()) ** 2)
    variance = np.sum((distances - intercept - slope * x) ** 2) / (points - 2)
    line = np.sqrt(variance * (1 / points + x.mean() ** 2 / spread))
    error = np.hypot(line, frechet_error(features, reference))
    return Extrapolated(float(intercept), float(error), rows, distances)


def check_features(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of features in float64. Raises ValueError as `frechet_distance`."""
    a, b = _checked(a), _checked(b)
    _check_widths(a.shape[1], b.shape[1])
    return a, b


def _checked(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise InputError(f"features must be (N, D) with at least two rows, got the shape {features.shape}")
    if not np.isfinite(features).all():
        raise InputError("a feature is not finite")
    return features


def _check_widths(a: int, b: int) -> None:
    if a != b:
        raise InputError(f"the sets have features of different widths: {a} and {b}")


def _as_moments(features: Set) -> Moments:
    if not isinstance(features, Moments):
        return moments(np.asanyarray(features))
    mean, cov = (np.asarray(x, np.float64) for x in features[1:])
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise InputError(f"a mean (D,) and a covariance (D, D) do not fit: {mean.shape} and {cov.shape}")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise InputError("a mean or a covariance is not finite")
    return Moments(features.count, mean, cov)


def _root(cov: np.ndarray) -> np.ndarray:
    # The symmetric square root of a covariance.
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(_significant(values))) @ vectors.T


def _factor(cov: np.ndarray) -> np.ndarray:
    # F with F F^T = cov. It has a column for each direction in which there is variance.
    values, vectors = np.linalg.eigh(cov)
    values = _significant(values)
    return vectors[:, values > 0] * np.sqrt(values[values > 0])


def _significant(values: np.ndarray) -> np.ndarray:
    # The square root of a rounding error is large beside the rounding error, so it is set to zero before.
    least = max(values.max(), 0) * len(values) * np.finfo(np.float64).eps
    return np.where(values > least, values, 0)


class _Gaussian(NamedTuple):
    # mean: (D,). factor: (D, R), F with F F^T = the covariance. trace: of the covariance.
    mean: np.ndarray
    factor: np.ndarray
    trace: float


def _gaussian(features: Set) -> _Gaussian:
    if isinstance(features, Moments):
        found = _as_moments(features)
        return _Gaussian(found.mean, _factor(found.cov), float(np.trace(found.cov)))
    features = np.asanyarray(features)
    if features.ndim != 2 or len(features) > features.shape[1]:
        return _gaussian(moments(features))
    rows = _checked(features)
    mean = rows.mean(axis=0)
    factor = (rows - mean).T / np.sqrt(len(rows) - 1)
    return _Gaussian(mean, factor, float(np.sum(np.square(factor))))


def _distance(a: _Gaussian, b: _Gaussian) -> float:
    # Eigenvalues of C_a C_b would be squares of small numbers, and the small ones would drown in rounding
    # errors.
    cross = np.linalg.svd(a.factor.T @ b.factor, compute_uv=False)
    distance = np.sum((a.mean - b.mean) ** 2) + a.trace + b.trace
    return float(max(distance - 2 * cross.sum(), 0.0))
