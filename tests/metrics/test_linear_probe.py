"""The linear probe: what it separates, that it chooses C on training rows, and its errors."""

import sys

import numpy as np
import pytest

from unclip_jax.metrics.linear_probe import linear_probe


def clusters(n, spread, seed, classes=3, width=6):
    rng = np.random.default_rng(seed)
    centres = np.eye(classes, width) * 4
    labels = np.arange(n) % classes
    return centres[labels] + spread * rng.normal(size=(n, width)), labels


def test_clusters_are_separated():
    """Distant clusters give no error, and labels may be names. Pure noise gives chance."""
    (train, labels), (test, truth) = clusters(150, 0.3, 0), clusters(90, 0.3, 1)
    names = np.array(["cat", "dog", "ox"])
    found = linear_probe(train, names[labels], test, names[truth])
    assert found.accuracy == 1.0 and found.validation_accuracy == 1.0
    rng = np.random.default_rng(2)
    noise = linear_probe(
        rng.normal(size=(600, 6)), rng.integers(0, 3, 600), rng.normal(size=(900, 6)), rng.integers(0, 3, 900)
    )
    assert abs(noise.accuracy - 1 / 3) < 5 * np.sqrt(2 / 9 / 900)


def test_the_strength_is_chosen_on_training_rows():
    """A faint but relevant direction needs a weak penalty, many noisy ones a strong penalty.

    The test rows do not influence the choice.
    """
    rng = np.random.default_rng(3)
    faint = rng.normal(size=(400, 4)) * [1e-2, 1, 1, 1]
    labels = (faint[:, 0] > 0).astype(int)
    weak = linear_probe(faint[:200], labels[:200], faint[200:], labels[200:])
    assert weak.accuracy > 0.9 and weak.c > 1e2
    many = rng.normal(size=(160, 300))
    labels = (many[:, 0] + 2 * rng.normal(size=160) > 0).astype(int)
    strong = linear_probe(many[:80], labels[:80], many[80:], labels[80:])
    assert strong.c < weak.c
    other = linear_probe(many[:80], labels[:80], many[80:], 1 - labels[80:])
    assert other.c == strong.c and other.accuracy == pytest.approx(1 - strong.accuracy)


def test_what_is_refused(monkeypatch):
    """One class, a class with one row, or a test row of no training class.

    A missing library's error says how to install it.
    """
    x = np.ones((4, 2))
    with pytest.raises(ValueError, match="two classes with two training rows each, got 1, one with 4"):
        linear_probe(x, np.zeros(4), x, np.zeros(4))
    with pytest.raises(ValueError, match="got 2, one with 1"):
        linear_probe(x, np.array([0, 0, 0, 1]), x, np.zeros(4))
    with pytest.raises(
        ValueError, match="1 classes of the test rows have no training rows; the first is 'ox'"
    ):
        linear_probe(x, np.array(["a", "a", "b", "b"]), x, np.array(["a", "b", "ox", "ox"]))
    monkeypatch.setitem(sys.modules, "sklearn.exceptions", None)
    with pytest.raises(ImportError, match=r"unclip_jax\[eval\]"):
        linear_probe(x, np.array([0, 0, 1, 1]), x, np.zeros(4))
