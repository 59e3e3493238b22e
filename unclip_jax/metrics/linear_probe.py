"""The linear probe: the accuracy of a linear classifier on frozen features (CLIP section 3.2, appendix A.3).

It is a logistic regression, fitted by L-BFGS without augmentation in at most 1,000 iterations. Held-out
training rows choose its L2 strength: first among powers of 10, then in ever smaller steps around the best
value.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unclip_jax.errors import InputError, MissingPackageError

MAX_ITERATIONS = 1000
COARSE = tuple(10.0**power for power in (-6, -4, -2, 0, 2, 4, 6))  # of C, the inverse of the strength
REFINEMENTS = (1.0, 0.5, 0.25)  # steps in decades around the best value so far
_SMALL = 10**7  # entries of a matrix; below, one thread is faster than several


class Probe(NamedTuple):
    """accuracy: on the test rows. c: the chosen C. validation_accuracy: on the held-out rows, with c."""

    accuracy: float
    c: float
    validation_accuracy: float


def check_installed() -> None:
    """Raises an ImportError, with a message of one line, unless scikit-learn is installed."""
    try:
        import sklearn.exceptions  # noqa: F401
        import threadpoolctl  # noqa: F401
    except ImportError:
        raise MissingPackageError(
            'the linear probe needs scikit-learn: pip install "unclip_jax[eval]"'
        ) from None


def check_classes(train_labels: Sequence, test_labels: Sequence) -> np.ndarray:
    """The number of training rows of each class. Call it before the rows are embedded.

    Raises:
      ValueError: when there are fewer than two classes, a class with a single training row, or a test row of
        a class without training rows.
    """
    classes, counts = np.unique(np.asarray(train_labels), return_counts=True)
    if len(counts) < 2 or min(counts) < 2:
        raise InputError(
            "a probe needs two classes with two training rows each, "
            f"got {len(counts)}, one with {min(counts, default=0)}"
        )
    unseen = np.setdiff1d(np.asarray(test_labels), classes)
    if len(unseen):
        raise InputError(
            f"{len(unseen)} classes of the test rows have no training rows; the first is {str(unseen[0])!r}"
        )
    return counts


def linear_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    held_out: float = 0.2,
    seed: int = 0,
) -> Probe:
    """Chooses C on a held-out part of the training features, fits on all of them, and tests.

    Args:
      train: (N, F) features; train_labels: (N,) int.
      test: (M, F); test_labels: (M,) int.
      held_out: fraction of each class's training rows that is held out to choose C.
      seed: seed of that split.

    Returns:
      The accuracies and C.

    Raises:
      ImportError: without scikit-learn (extra `eval`).
      ValueError: as `check_classes`.
    """
    check_installed()
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from threadpoolctl import threadpool_limits

    counts = check_classes(train_labels, test_labels)

    def fit(features, labels, c):
        with threadpool_limits(1 if features.size < _SMALL else None), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # reaching MAX_ITERATIONS is intended
            return LogisticRegression(C=c, solver="lbfgs", max_iter=MAX_ITERATIONS).fit(features, labels)

    test_size = max(int(round(held_out * len(train))), len(counts))
    fitted, chosen, fitted_labels, chosen_labels = train_test_split(
        train, train_labels, test_size=test_size, stratify=train_labels, random_state=seed
    )
    scores: dict[float, float] = {}

    def score(c):
        if c not in scores:
            scores[c] = fit(fitted, fitted_labels, c).score(chosen, chosen_labels)
        return scores[c]

    best = max(COARSE, key=score)
    for step in REFINEMENTS:
        best = max((best, best * 10**-step, best * 10**step), key=score)
    return Probe(
        float(fit(train, train_labels, best).score(test, test_labels)), float(best), float(scores[best])
    )
