"""Retrieval at one and recall at k: perfect scores, chance, ties, groups, several captions per image."""

import numpy as np
import pytest

from unclip_jax.metrics.retrieval import mean_cosine, recall_at_k, retrieval_at_1


@pytest.fixture(scope="module")
def z():
    return np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32)


def test_own_candidates_are_found(z):
    """The score with itself is perfect, for vectors of any length and with a little noise.

    It is zero when every candidate is the opposite.
    """
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
    """A constant answer scores zero, and two equal candidates both count as misses."""
    assert retrieval_at_1(z, np.ones_like(z)) == 0.0
    assert retrieval_at_1(np.ones_like(z), np.ones_like(z)) == 0.0
    twice = z[:10].repeat(2, axis=0)
    assert retrieval_at_1(twice, twice, group=20) == 0.0
    assert retrieval_at_1(twice[::2], twice[::2], group=10) == 1.0


def test_groups_are_consecutive_and_whole(z):
    """A row competes only inside its group, and an incomplete last group is left out."""
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
    """The cosine of rows with themselves, with their opposites, and with one direction for all rows."""
    np.testing.assert_allclose(mean_cosine(z, 3 * z), 1)
    np.testing.assert_allclose(mean_cosine(z, -z), -1)
    axis = np.eye(16)[0]
    expected = np.mean(z[:, 0] / np.linalg.norm(z, axis=-1))
    np.testing.assert_allclose([mean_cosine(z, axis), mean_cosine(z, axis[None])], expected, rtol=1e-6)


def test_recall_by_hand():
    """Two images and three captions.

    The first image's second caption is nearest to it. Its first caption is nearest to no image.
    """
    image = np.eye(3)[:2]
    text = np.array([[0.1, 0.5, 0.9], [1.0, 0.1, 0.0], [0.9, 0.8, 0.0]])
    recall = recall_at_k(image, text, [0, 0, 1], (1, 2, 3))
    assert recall["image_to_text"] == {1: 1.0, 2: 1.0, 3: 1.0}
    assert recall["text_to_image"] == {1: 1 / 3, 2: 1.0, 3: 1.0}
    swapped = recall_at_k(image, text, [1, 1, 0], (1, 2))
    assert swapped["image_to_text"] == {1: 0.0, 2: 1.0} and swapped["text_to_image"] == {1: 2 / 3, 2: 1.0}


def test_recall_limits(z):
    """The recall with itself is perfect in any order of captions.

    It is k / n for unrelated rows, within four standard errors. Ties count as misses.
    """
    order = np.random.default_rng(3).permutation(1500)
    perfect = recall_at_k(z[:1500], 3 * z[order], order, (1, 10))
    assert perfect == {"image_to_text": {1: 1.0, 10: 1.0}, "text_to_image": {1: 1.0, 10: 1.0}}
    other = np.random.default_rng(2).normal(size=z.shape)
    for way in recall_at_k(z, other, np.arange(2000), (20, 200)).values():
        for k, value in way.items():
            assert abs(value - k / 2000) < 4 * np.sqrt(k / 2000 / 2000)
    tied = recall_at_k(z[:50], np.ones((50, 16)), np.arange(50), (1, 49, 50))
    assert tied["image_to_text"] == {1: 0.0, 49: 0.0, 50: 1.0}
    assert recall_at_k(np.ones((50, 16)), z[:50], np.arange(50), (1, 49))["text_to_image"] == {
        1: 0.0,
        49: 0.0,
    }


@pytest.mark.parametrize(
    ("owner", "ks", "message"),
    [
        (np.arange(9), (1,), "must be 10 numbers"),
        (np.full(10, 10), (1,), r"in \[0, 10\)"),
        (np.zeros(10, int), (1,), "9 of 10 images have no caption"),
        (np.arange(10), (0,), "at least 1, got 0"),
    ],
)
def test_what_recall_refuses(z, owner, ks, message):
    with pytest.raises(ValueError, match=message):
        recall_at_k(z[:10], z[:10], owner, ks)
