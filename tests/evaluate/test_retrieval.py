"""Retrieval at one: its perfect score, its chance level, ties and groups."""

import numpy as np
import pytest

from unclip_jax.evaluate.retrieval import mean_cosine, retrieval_at_1


@pytest.fixture(scope="module")
def z():
    return np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32)


def test_own_candidates_are_found(z):
    """Perfect with itself, whatever the lengths of the vectors and a little noise; nothing when every candidate is the opposite."""
    lengths = np.random.default_rng(1).uniform(0.1, 10, (2000, 1))
    assert retrieval_at_1(z, z * lengths) == 1.0
    assert retrieval_at_1(z + 0.05, z) == 1.0
    assert retrieval_at_1(z, -z) == 0.0


def test_chance_is_one_in_a_group(z):
    """Unrelated candidates: 1 / group within four standard errors."""
    other = np.random.default_rng(2).normal(size=z.shape)
    for group in (2, 10, 100):
        chance = 1 / group
        assert abs(retrieval_at_1(z, other, group) - chance) < 4 * np.sqrt(chance * (1 - chance) / 2000)


def test_ties_are_misses(z):
    """A constant answer wins nothing, and two equal candidates are not told apart."""
    assert retrieval_at_1(z, np.ones_like(z)) == 0.0
    assert retrieval_at_1(np.ones_like(z), np.ones_like(z)) == 0.0
    twice = z[:10].repeat(2, axis=0)
    assert retrieval_at_1(twice, twice, group=20) == 0.0
    assert retrieval_at_1(twice[::2], twice[::2], group=10) == 1.0


def test_groups_are_consecutive_and_whole(z):
    """A row competes only inside its group; the rest that fills none is left out."""
    repeated = np.concatenate([z[:5], z[:5]])  # the same candidates in both groups: no ties inside either
    assert retrieval_at_1(repeated, repeated, group=5) == 1.0
    assert retrieval_at_1(repeated, repeated, group=10) == 0.0
    damaged = z[:7].copy()
    damaged[5:] = -damaged[5:]
    assert retrieval_at_1(z[:7], damaged, group=5) == 1.0


def test_too_few_rows(z):
    """The message gives both numbers."""
    with pytest.raises(ValueError, match="among 100 needs at least 100 rows, got 99"):
        retrieval_at_1(z[:99], z[:99])


def test_mean_cosine(z):
    """Of rows with themselves, their opposites, and with one direction for all."""
    np.testing.assert_allclose(mean_cosine(z, 3 * z), 1)
    np.testing.assert_allclose(mean_cosine(z, -z), -1)
    axis = np.eye(16)[0]
    expected = np.mean(z[:, 0] / np.linalg.norm(z, axis=-1))
    np.testing.assert_allclose([mean_cosine(z, axis), mean_cosine(z, axis[None])], expected, rtol=1e-6)
