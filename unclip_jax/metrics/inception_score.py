"""The Inception score (Salimans et al. 2016): how sure and how diverse a classifier's answers are.

It is exp(E_x KL(p(y|x) || p(y))), computed for each of several parts of the set. It looks at no real image.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from unclip_jax.errors import InputError


class InceptionScore(NamedTuple):
    """mean, std: over the parts."""

    mean: float
    std: float


def inception_score(logits: np.ndarray, *, splits: int = 10, seed: int | None = 2020) -> InceptionScore:
    """The Inception score, in [1, C].

    With the defaults this is torch-fidelity 0.4.0: rows are shuffled by NumPy's legacy generator, whose
    stream is frozen, and cut into 10 parts. It takes Inception's 1008 logits without the bias. ADM's
    evaluator takes them without the bias too, does not shuffle (`seed=None`), and cuts parts of 5000 rows.

    Args:
      logits: (N, C).
      splits: number of parts, at most N. Fewer rows in a part give a smaller score.
      seed: random seed of the shuffle, in [0, 2^32); None keeps the order.

    Raises:
      ValueError: when there are fewer rows than parts, a logit is not finite, or an option is out of its
        range.
    """
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2 or splits < 1 or len(logits) < splits:
        raise InputError(
            f"the Inception score needs (N, C) logits with at least as many rows as parts, got the shape "
            f"{logits.shape} and {splits} parts"
        )
    if not np.isfinite(logits).all():
        raise InputError("a logit is not finite")
    if seed is not None:
        if not 0 <= seed < 2**32:
            raise InputError(f"a seed lies in [0, 2^32), got {seed}")
        logits = logits[np.random.RandomState(seed).permutation(len(logits))]
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    edges = [part * len(logits) // splits for part in range(splits + 1)]
    scores = []
    for first, last in zip(edges[:-1], edges[1:]):
        p = np.exp(log_p[first:last])
        marginal = p.mean(axis=0)
        # A class of probability 0 adds 0 to the divergence.
        kl = np.where(p > 0, p * (log_p[first:last] - np.log(np.where(marginal > 0, marginal, 1))), 0)
        scores.append(np.exp(kl.sum(axis=1).mean()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))
