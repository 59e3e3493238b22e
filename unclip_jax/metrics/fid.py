"""The Fréchet distance between two sets of features (Heusel et al. 2017): FID, with any feature network.

Each set is described by the mean and the covariance of its features. The distance is

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

FID is biased: it grows as a set gets smaller. Compare only values of sets of equal sizes.
"""

from __future__ import annotations

import numpy as np

from unclip_jax.errors import InputError


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Fréchet distance between two sets of features, at least 0.

    The trace of (C_a C_b)^(1/2) is that of (C_a^(1/2) C_b C_a^(1/2))^(1/2). The latter matrix is symmetric,
    so its eigenvalues are real, also when a covariance is singular.

    Args:
      a: (N, D) features.
      b: (M, D) features.

    Raises:
      ValueError: when a set has fewer than two rows, the widths differ, or a feature is not finite.
    """
    (mean_a, cov_a), (mean_b, cov_b) = _moments(a, b)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.linalg.eigvalsh(root_a @ cov_b @ root_a)
    distance = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b)
    return float(max(distance - 2 * np.sqrt(np.maximum(cross, 0)).sum(), 0.0))


def check_features(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of features in float64. Raises ValueError as `frechet_distance`."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    for features in (a, b):
        if features.ndim != 2 or len(features) < 2:
            raise InputError(
                f"features must be (N, D) with at least two rows, got the shape {features.shape}"
            )
        if not np.isfinite(features).all():
            raise InputError("a feature is not finite")
    if a.shape[1] != b.shape[1]:
        raise InputError(f"the sets have features of different widths: {a.shape[1]} and {b.shape[1]}")
    return a, b


def _moments(a: np.ndarray, b: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    sets = check_features(a, b)
    return [(features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))) for features in sets]
