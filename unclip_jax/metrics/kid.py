"""The kernel inception distance (Binkowski et al. 2018), with any feature network.

It is the squared maximum mean discrepancy with the kernel (x . y / D + 1)^3, estimated without bias. So it
may be slightly negative, and its expectation does not depend on the sizes of the sets.
"""

from __future__ import annotations

import numpy as np

from unclip_jax.metrics.fid import check_features


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy between two sets of features.

    Args:
      a: (N, D) features.
      b: (M, D) features.

    Raises:
      ValueError: when a set has fewer than two rows, the widths differ, or a feature is not finite.
    """
    a, b = check_features(a, b)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: np.ndarray) -> float:  # the mean over pairs of different rows
        values = kernel(x, x)
        return (values.sum() - np.trace(values)) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())
