"""Memorisation: how near a sample lies to its nearest training image, and how near a held-out image lies.

A model that generalises draws samples that are about as far from the training images as real images that it
never saw. A copy lies much nearer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from unclip_jax.errors import InputError

_ROWS = 256  # queries per block of the distance matrix


class Nearest(NamedTuple):
    """row: (N,) int, the nearest reference of each query. distance: (N,) float64, how far it is."""

    row: np.ndarray
    distance: np.ndarray


def nearest(queries: np.ndarray, references: np.ndarray) -> Nearest:
    """The nearest reference of each query: the smallest root mean square difference of the values.

    For features, divide them by their norms first (`retrieval.unit`): the order is then that of the cosine.

    Args:
      queries: (N, ...) arrays: features, or pictures in [-1, 1].
      references: (M, ...), of the same trailing shape; M at least 1.

    Raises:
      ValueError: when there is no reference, or the shapes differ.
    """
    if not len(references) or queries.shape[1:] != references.shape[1:]:
        raise InputError(f"cannot compare {queries.shape} with {references.shape}: shapes differ, or no rows")
    q = np.asarray(queries, np.float64).reshape(len(queries), -1)
    r = np.asarray(references, np.float64).reshape(len(references), -1)
    norms = np.sum(r**2, axis=1)
    rows, distances = [], []
    for first in range(0, len(q), _ROWS):
        block = q[first : first + _ROWS]
        row = np.argmin(norms - 2 * block @ r.T, axis=1)
        rows.append(row)
        distances.append(np.sqrt(np.mean((block - r[row]) ** 2, axis=1)))  # exact, also near 0
    return Nearest(np.concatenate([*rows, np.zeros(0, int)]), np.concatenate([*distances, np.zeros(0)]))


def copies(samples: np.ndarray, held_out: np.ndarray, quantile: float = 0.05) -> float:
    """The share of samples that lie nearer to the training images than almost any held-out image does.

    Args:
      samples: (N,) distances of samples to their nearest training images.
      held_out: (M,) the same of real held-out images.
      quantile: of the held-out distances, below which a sample counts as a copy. A model that generalises
        reaches about this share.
    """
    return float(np.mean(np.asarray(samples) < np.quantile(held_out, quantile)))
