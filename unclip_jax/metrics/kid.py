"""The kernel inception distance (Binkowski et al. 2018), with any feature network.

It is the squared maximum mean discrepancy with the kernel (x . y / D + 1)^3, estimated without bias. So it
may be slightly negative, and its expectation does not depend on the sizes of the sets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from unclip_jax.errors import InputError
from unclip_jax.metrics.fid import check_features

_BLOCK = 2**24  # values in a block of the kernel matrix


class KernelInceptionDistance(NamedTuple):
    """mean, std: over the subsets. The std says how much one subset varies; it is not the mean's error."""

    mean: float
    std: float


def kernel_inception_distance(
    a: np.ndarray, b: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> KernelInceptionDistance:
    """KID as published: the mean and the standard deviation of `kernel_distance` over random subsets.

    The subsets are those that torch-fidelity 0.4.0 draws with the same seed: NumPy's legacy generator, whose
    stream is frozen, takes rows of a, then of b, without replacement, for one subset after the other.

    Args:
      a: (N, D) features, may be memory-mapped.
      b: (M, D) features, may be memory-mapped.
      subsets: number of subsets.
      subset_size: rows of a subset in each set, at least 2.
      seed: random seed of the subsets, in [0, 2^32).

    Raises:
      ValueError: when a set has fewer rows than a subset, an option is out of its range, or as
        `kernel_distance`.
    """
    if subsets < 1 or subset_size < 2 or not 0 <= seed < 2**32:
        raise InputError(
            "KID needs at least 1 subset of at least 2 rows and a seed in [0, 2^32), got "
            f"{subsets} of {subset_size} with the seed {seed}"
        )
    if min(len(a), len(b)) < subset_size:
        raise InputError(
            f"KID takes subsets of {subset_size} rows, and the sets have {len(a)} and {len(b)}: "
            "use more rows or smaller subsets"
        )
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        rows = (rng.choice(len(features), subset_size, replace=False) for features in (a, b))
        values.append(kernel_distance(a[next(rows)], b[next(rows)]))
    return KernelInceptionDistance(float(np.mean(values)), float(np.std(values)))


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy between two sets of features.

    The kernel matrix is read in blocks, so memory is bounded.

    Args:
      a: (N, D) features.
      b: (M, D) features.

    Raises:
      ValueError: when a set has fewer than two rows, the widths differ, or a feature is not finite.
    """
    a, b = check_features(a, b)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        value = x @ y.T / x.shape[1] + 1
        return value * value * value

    def within(x: np.ndarray) -> float:  # the mean over pairs of different rows
        same = np.sum((np.sum(x * x, axis=1) / x.shape[1] + 1) ** 3)
        return (kernel_sum(x, x, kernel) - same) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel_sum(a, b, kernel) / (len(a) * len(b)))


def kernel_sum(a: np.ndarray, b: np.ndarray, kernel: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> float:
    """The sum of a symmetric kernel over all pairs of rows of a and b, in blocks of bounded memory.

    Args:
      a: (N, D).
      b: (M, D); the very object a for all pairs of one set, which takes half of the time.
      kernel: (n, D), (m, D) -> (n, m).
    """
    side, total = int(_BLOCK**0.5), 0.0
    for i in range(0, len(a), side):
        for j in range(i if b is a else 0, len(b), side):
            block = kernel(a[i : i + side], b[j : j + side]).sum(dtype=np.float64)
            total += 2 * block if b is a and j > i else block
    return float(total)
