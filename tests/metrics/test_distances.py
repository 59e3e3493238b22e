"""KID, bootstrap intervals and memorisation against closed forms, and features that distances refuse."""

import numpy as np
import pytest

from unclip_jax.metrics.bootstrap import interval
from unclip_jax.metrics.fid import frechet_distance
from unclip_jax.metrics.kid import kernel_distance
from unclip_jax.metrics.memorisation import copies, nearest

RNG = np.random.default_rng(0)


def test_kernel_distance_is_the_mean_over_pairs():
    """It equals the sums over pairs written out, and its mean over draws of one distribution is 0."""
    a, b = RNG.normal(size=(5, 4)), RNG.normal(size=(6, 4)) + 1
    k = lambda x, y: (np.dot(x, y) / 4 + 1) ** 3
    pairs = lambda x: np.mean([k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])
    expected = pairs(a) + pairs(b) - 2 * np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-12)
    draws = [kernel_distance(RNG.normal(size=(20, 4)), RNG.normal(size=(30, 4))) for _ in range(400)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / 20
    assert min(draws) < 0 < max(draws)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
@pytest.mark.parametrize(
    "a, b, message",
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "at least two rows"),
        (np.zeros((0, 3)), np.zeros((5, 3)), "at least two rows"),
        (np.zeros((5, 3)), np.zeros((5, 4)), "different widths: 3 and 4"),
        (np.full((5, 3), np.nan), np.zeros((5, 3)), "not finite"),
    ],
)
def test_bad_features_are_refused(distance, a, b, message):
    with pytest.raises(ValueError, match=message):
        distance(a, b)


def test_bootstrap_interval():
    """The interval of a mean covers the standard error, keeps rows together, and repeats with its seed."""
    values = RNG.normal(size=1000)
    low, high = interval([values], resamples=2000)
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(1000), rel=0.15) and low < values.mean() < high
    assert interval([values], resamples=2000) == interval([values], resamples=2000)
    assert interval([values, -values], lambda a, b: float(np.mean(a + b))) == (0.0, 0.0)
    with pytest.raises(ValueError, match="one length"):
        interval([values, values[:5]])


def test_a_planted_copy_is_found():
    """The nearest row is the planted one; only the copy counts as nearer than held-out images are."""
    rng = np.random.default_rng(1)
    training = rng.uniform(-1, 1, (700, 8, 8, 3))
    held_out, samples = rng.uniform(-1, 1, (60, 8, 8, 3)), rng.uniform(-1, 1, (40, 8, 8, 3))
    samples[7] = training[123] + 0.01
    match, reference = nearest(samples, training), nearest(held_out, training)
    assert match.row[7] == 123 and match.distance[7] == pytest.approx(0.01, rel=1e-6)
    differences = np.sqrt(((samples[3] - training) ** 2).mean(axis=(1, 2, 3)))
    assert match.row[3] == differences.argmin() and match.distance[3] == pytest.approx(differences.min())
    assert copies(match.distance, reference.distance, quantile=0.0) == pytest.approx(1 / 40)
    with pytest.raises(ValueError, match="cannot compare"):
        nearest(samples, training[:, :4])
