"""Retrieval and cosine figures on CLIP embeddings, in NumPy. Every embedding array is (N, D) and is normalised here."""

from __future__ import annotations

import numpy as np


def _unit(z: np.ndarray) -> np.ndarray:
    z = np.asarray(z, np.float64)
    return z / np.maximum(np.linalg.norm(z, axis=-1, keepdims=True), 1e-12)


def retrieval_at_1(queries: np.ndarray, candidates: np.ndarray, group: int = 100) -> float:
    """Fraction of queries whose own candidate (same row) is nearest by cosine among the `group` candidates of its group.

    Rows are taken in consecutive groups; a last group that is not full is left out, so that chance is exactly 1 / group. A tie counts
    as a miss.

    Args:
      queries, candidates: (N, D).
      group: number of candidates G.

    Raises:
      ValueError: when there are fewer than `group` rows.
    """
    n = len(queries) // group * group
    if n == 0:
        raise ValueError(f"retrieval among {group} needs at least {group} rows, got {len(queries)}")
    q = _unit(queries[:n]).reshape(-1, group, queries.shape[-1])
    c = _unit(candidates[:n]).reshape(-1, group, candidates.shape[-1])
    similarity = np.einsum("gid,gjd->gij", q, c)
    own = np.einsum("gii->gi", similarity).copy()
    np.einsum("gii->gi", similarity)[...] = -np.inf
    return float(np.mean(own > similarity.max(axis=-1)))


def mean_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Mean cosine of corresponding rows; b may be one row (D,) or (1, D)."""
    return float(np.mean(np.sum(_unit(a) * _unit(b), axis=-1)))
