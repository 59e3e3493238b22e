"""CLIP score: how well pictures fit their captions, by the cosine of CLIP's embeddings.

Two scales are in use. Karlo, GLIDE and unCLIP print the mean cosine (Karlo's 0.3192). Hessel et al. 2021
print the mean of 2.5 max(cosine, 0). Some programs print 100 times the cosine. Values of different CLIPs
cannot be compared.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from unclip_jax.errors import InputError
from unclip_jax.metrics.bootstrap import interval
from unclip_jax.metrics.retrieval import unit

HESSEL_WEIGHT = 2.5


class ClipScore(NamedTuple):
    """mean: over the pairs. low, high: the bounds of its 95 % interval by bootstrap over the pairs."""

    mean: float
    low: float
    high: float


def clip_score(
    image: np.ndarray, text: np.ndarray, *, hessel: bool = False, resamples: int = 1000, seed: int = 0
) -> ClipScore:
    """The mean cosine of pictures and their captions.

    Args:
      image: (N, D) embeddings of any norm above 0.
      text: (N, D), of the captions, in the same order.
      hessel: gives 2.5 max(cosine, 0) (Hessel et al. 2021), in [0, 2.5], and not the cosine, in [-1, 1].
      resamples: number of bootstrap resamples.
      seed: random seed of the bootstrap.

    Raises:
      ValueError: when the shapes differ, there is no row, an embedding is not finite, or one is zero.
    """
    image, text = np.asarray(image, np.float64), np.asarray(text, np.float64)
    if image.ndim != 2 or image.shape != text.shape or not len(image):
        raise InputError(
            f"a CLIP score needs one picture per caption, (N, D) each, got {image.shape} and {text.shape}"
        )
    for embeddings in (image, text):
        if not np.isfinite(embeddings).all():
            raise InputError("an embedding is not finite")
        if not embeddings.any(axis=1).all():
            raise InputError("an embedding is zero, and has no direction")
    cosine = np.sum(unit(image) * unit(text), axis=1)
    values = HESSEL_WEIGHT * np.maximum(cosine, 0) if hessel else cosine
    return ClipScore(float(np.mean(values)), *interval([values], resamples=resamples, seed=seed))
