"""The Fréchet distance, its limit and its errors, against closed forms and the reference implementations."""

import numpy as np
import pytest
import scipy.linalg
import torch

from tests.fidelity import torch_fidelity
from unclip_jax.metrics.fid import frechet_distance, frechet_distance_at_infinity, frechet_error
from unclip_jax.metrics.moments import Moments, moments

RNG = np.random.default_rng(0)


def exact_gaussian(mean, cov, n=400):
    """Rows whose sample mean and covariance are exactly these."""
    x = RNG.normal(size=(n, len(mean)))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(cov).T + mean


def test_frechet_distance_of_gaussians():
    """It equals the closed form for covariances that commute, and is symmetric for those that do not."""
    a = exact_gaussian([0.0, 0.0, 0.0], np.diag([1.0, 4.0, 9.0]))
    b = exact_gaussian([1.0, 2.0, 0.0], np.diag([4.0, 1.0, 9.0]))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (1 - 2) ** 2 + (2 - 1) ** 2, rel=1e-9)
    mixing = np.array([[2.0, 0.3, 0.0], [0.3, 1.0, 0.5], [0.0, 0.5, 3.0]])
    c = exact_gaussian([0.5, 0.0, 1.0], mixing)
    root = np.linalg.eigvals(np.diag([1.0, 4.0, 9.0]) @ mixing)
    expected = 0.25 + 1 + 14 + np.trace(mixing) - 2 * np.sqrt(root.real).sum()
    assert frechet_distance(a, c) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, c) == pytest.approx(frechet_distance(c, a), rel=1e-9)


def test_frechet_distance_of_singular_sets():
    """Fewer rows than features: a set is at distance 0 from itself, and a shift by d at |d|^2. The trace of
    the root equals the sum of the singular values of the rows' products, which needs no root."""
    x, y = RNG.normal(size=(10, 50)), RNG.normal(size=(12, 50)) + 1
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 2.0) == pytest.approx(4 * 50, rel=1e-12)
    a, b = ((z - z.mean(axis=0)) / np.sqrt(len(z) - 1) for z in (x, y))
    expected = np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2) + np.sum(a**2) + np.sum(b**2)
    expected -= 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-7)
    many = RNG.normal(size=(70, 50))
    assert frechet_distance(x, many) == pytest.approx(frechet_distance(moments(x), many), rel=1e-7)


@pytest.mark.parametrize("least", [1e-4, 1e-8])
def test_frechet_distance_of_features_with_little_variance(least):
    """Inception has features whose variance is far below that of others; they count too."""
    width = 200
    basis, _ = np.linalg.qr(RNG.normal(size=(width, width)))
    variances = np.geomspace(20, least, width), np.geomspace(22, least * 2, width)
    a, b = (Moments(None, np.zeros(width), (basis * each) @ basis.T) for each in variances)
    expected = np.sum((np.sqrt(variances[0]) - np.sqrt(variances[1])) ** 2)
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-9)


def test_frechet_distance_of_equal_rows():
    """A set of one repeated row has no covariance: the distance is that of the means and the other trace."""
    x, y = np.full((20, 3), 0.1), RNG.normal(size=(30, 3))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    expected = np.sum((0.1 - y.mean(axis=0)) ** 2) + y.var(axis=0, ddof=1).sum()
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_moments():
    """Moments give what the features give, and moments that do not fit are refused."""
    x, y = RNG.normal(size=(30, 4)), RNG.normal(size=(40, 4)) + 1
    a, b = moments(x), moments(y)
    assert frechet_distance(a, b) == frechet_distance(x, y) == frechet_distance(x, b) > 1
    for bad, message in (
        (a._replace(mean=a.mean[:3]), "do not fit"),
        (a._replace(cov=a.cov * np.inf), "not finite"),
        (moments(x[:, :3]), "different widths: 3 and 4"),
    ):
        with pytest.raises(ValueError, match=message):
            frechet_distance(bad, b)


@pytest.mark.parametrize("rows, width", [(200, 64), (40, 64)])
def test_frechet_distance_equals_the_references(rows, width):
    """torch-fidelity's eigenvalues and pytorch-fid's matrix root, with full and with singular covariances."""
    reference = torch_fidelity("metric_fid")
    mixing = RNG.normal(size=(width, width)) / np.sqrt(width)
    a, b = RNG.normal(size=(rows, width)) @ mixing, RNG.normal(size=(rows, width)) @ mixing + 0.1
    stats = [reference.fid_features_to_statistics(torch.tensor(x)) for x in (a, b)]
    theirs = reference.fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6)
    root = scipy.linalg.sqrtm(stats[0]["sigma"] @ stats[1]["sigma"])
    shift = stats[0]["mu"] - stats[1]["mu"]
    theirs = shift @ shift + sum(np.trace(s["sigma"]) for s in stats) - 2 * np.trace(root.real)
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6)


def test_frechet_distance_at_infinity():
    """Two draws of one distribution: the distance of few samples is large, and its limit is near 0."""
    reference, samples = RNG.normal(size=(40000, 16)), RNG.normal(size=(3000, 16))
    result = frechet_distance_at_infinity(samples, reference, smallest=200)
    assert result.rows[0] == 200 and result.rows[-1] == 3000 and len(result.rows) == 15
    assert result.distances[-1] == pytest.approx(frechet_distance(samples, reference), rel=1e-9)
    assert abs(result.distance) < 0.25 * result.distances[-1] < 0.03 * result.distances[0]
    shifted = frechet_distance_at_infinity(samples + 1, reference, smallest=200)
    assert shifted.distance == pytest.approx(16, rel=0.02) and 0 < shifted.error < 0.5
    assert frechet_distance_at_infinity(samples, moments(reference), smallest=200).distance == result.distance
    for options in ({"smallest": 3000}, {"smallest": 1}, {"points": 2, "smallest": 200}):
        with pytest.raises(ValueError, match="FID at infinity needs"):
            frechet_distance_at_infinity(samples, reference, **options)


@pytest.mark.parametrize("shift, scale", [(0.3, 1.0), (1.0, 1.3)])
def test_standard_errors(shift, scale):
    """They are the deviations over draws, of the distance and of its limit, within a third."""
    rng = np.random.default_rng(2)
    reference = moments(exact_gaussian(np.zeros(8), np.eye(8)))
    draws = [scale * rng.normal(size=(1000, 8)) + shift / np.sqrt(8) for _ in range(60)]
    deviation = np.std([frechet_distance(x, reference) for x in draws])
    assert np.mean([frechet_error(x, reference) for x in draws]) == pytest.approx(deviation, rel=0.33)
    limits = [frechet_distance_at_infinity(x, reference, smallest=100) for x in draws[:40]]
    deviation = np.std([limit.distance for limit in limits])
    assert np.mean([limit.error for limit in limits]) == pytest.approx(deviation, rel=0.33)
    true = shift**2 + 8 * (scale - 1) ** 2
    assert abs(np.mean([limit.distance for limit in limits]) - true) < 4 * deviation / np.sqrt(40)
