"""Retrieval and cosine metrics on CLIP embeddings, in NumPy.

Every embedding array is (N, D). The functions normalise it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unclip_jax.errors import InputError

TIE = 1e-12  # cosines that differ by less are equal up to rounding
_ROWS = 1024  # captions per block of the similarity matrix


def unit(z: np.ndarray) -> np.ndarray:
    """Rows (..., D) divided by their norms, float64."""
    z = np.asarray(z, np.float64)
    return z / np.maximum(np.linalg.norm(z, axis=-1, keepdims=True), 1e-12)


def first_in_group(queries: np.ndarray, candidates: np.ndarray, group: int = 100) -> np.ndarray:
    """For each query, whether its true candidate (same row) is nearest by cosine among those of its group.

    Groups are `group` consecutive rows. An incomplete last group is left out, so that chance is exactly 1 /
    group. A tie counts as a miss.

    Args:
      queries, candidates: (N, D).
      group: number of candidates G.

    Returns:
      (N // G * G,) bool.

    Raises:
      ValueError: when there are fewer than `group` rows.
    """
    n = len(queries) // group * group
    if n == 0:
        raise InputError(f"retrieval among {group} needs at least {group} rows, got {len(queries)}")
    q = unit(queries[:n]).reshape(-1, group, queries.shape[-1])
    c = unit(candidates[:n]).reshape(-1, group, candidates.shape[-1])
    similarity = np.einsum("gid,gjd->gij", q, c)
    true_similarity = np.einsum("gii->gi", similarity).copy()
    np.einsum("gii->gi", similarity)[...] = -np.inf
    return (true_similarity > similarity.max(axis=-1)).reshape(-1)


def retrieval_at_1(queries: np.ndarray, candidates: np.ndarray, group: int = 100) -> float:
    """The share of queries that `first_in_group` finds right; same arguments and errors."""
    return float(np.mean(first_in_group(queries, candidates, group)))


def recall_at_k(
    image: np.ndarray, text: np.ndarray, owner: np.ndarray, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, dict[int, float]]:
    """Recall at k in both directions over the whole set, as for COCO and Flickr30k (CLIP section 3.1.5,
    appendix E.1).

    Image to text: the fraction of images with one of their own captions among the k nearest of all captions.
    Text to image: the fraction of captions whose image is among the k nearest of all images. A tie with a row
    of another image counts as a miss.

    Args:
      image: (N, D); text: (M, D).
      owner: (M,) int in [0, N), the image of each caption; every image has at least one.
      ks: the numbers of nearest rows.

    Returns:
      {"image_to_text": {k: recall}, "text_to_image": {k: recall}}.

    Raises:
      ValueError: when owner has the wrong length or range, an image has no caption, or a k is below 1.
    """
    n, owner = len(image), np.asarray(owner)
    if owner.shape != (len(text),) or owner.min(initial=0) < 0 or owner.max(initial=0) >= n:
        raise InputError(f"owner must be {len(text)} numbers in [0, {n}), one per caption")
    if len(np.unique(owner)) != n:
        raise InputError(f"{n - len(np.unique(owner))} of {n} images have no caption")
    if min(ks) < 1:
        raise InputError(f"k must be at least 1, got {min(ks)}")
    images, texts = unit(image), unit(text)
    # Per query: how many rows of other images are at least as near as the best true one.
    forward, backward = np.empty(n, int), np.empty(len(texts), int)
    for first in range(0, len(texts), _ROWS):
        rows = slice(first, first + _ROWS)
        similarity = texts[rows] @ images.T
        true_similarity = similarity[np.arange(len(similarity)), owner[rows]]
        backward[rows] = np.sum(similarity >= true_similarity[:, None] - TIE, axis=1) - 1
    order = np.argsort(owner, kind="stable")
    starts = np.searchsorted(owner[order], np.arange(n + 1))
    for i in range(n):
        similarity = texts @ images[i]
        captions = order[starts[i] : starts[i + 1]]  # of image i
        best = similarity[captions].max() - TIE
        forward[i] = np.sum(similarity >= best) - np.sum(similarity[captions] >= best)
    return {
        "image_to_text": {k: float(np.mean(forward < k)) for k in ks},
        "text_to_image": {k: float(np.mean(backward < k)) for k in ks},
    }


def mean_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Mean cosine of corresponding rows; b may be one row (D,) or (1, D)."""
    return float(np.mean(np.sum(unit(a) * unit(b), axis=-1)))
