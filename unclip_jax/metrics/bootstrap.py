"""Confidence intervals by the bootstrap (Efron 1979)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from unclip_jax.errors import InputError


def interval(
    arrays: Sequence[np.ndarray],
    statistic: Callable[..., float] = lambda values: float(np.mean(values)),
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile interval of a statistic under resampling of rows with replacement.

    Args:
      arrays: arrays with the same number of rows N. Each resample draws the same rows of all of them.
      statistic: called with the resampled arrays.
      level: the share of resamples that lies inside the interval, in (0, 1).
      resamples: number of resamples, at least 1.
      seed: random seed.

    Returns:
      (low, high).

    Raises:
      ValueError: when there are no rows, the arrays differ in length, or the level is out of range.
    """
    lengths = {len(array) for array in arrays}
    if len(lengths) != 1 or not min(lengths):
        raise InputError(f"a bootstrap needs arrays of one length above 0, got the lengths {sorted(lengths)}")
    if not 0 < level < 1 or resamples < 1:
        raise InputError(f"level must lie in (0, 1) and resamples be positive, got {level} and {resamples}")
    (n,), rng = lengths, np.random.default_rng(seed)
    values = [statistic(*(array[rows] for array in arrays)) for rows in rng.integers(n, size=(resamples, n))]
    tail = 50 * (1 - level)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
