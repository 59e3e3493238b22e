"""KID by subsets and CMMD, beside torch-fidelity's and the published formula."""

import numpy as np
import pytest
import torch

from tests.fidelity import torch_fidelity
from unclip_jax.metrics import kid
from unclip_jax.metrics.cmmd import cmmd
from unclip_jax.metrics.kid import kernel_distance, kernel_inception_distance
from unclip_jax.metrics.retrieval import unit

RNG = np.random.default_rng(0)
A = np.abs(RNG.normal(size=(300, 32))).astype(np.float32)
B = np.abs(RNG.normal(size=(250, 32)) + 0.2).astype(np.float32)


def test_kid_equals_torch_fidelity():
    """The same subsets by the same seed: the mean and the deviation agree, and another seed gives others."""
    features_to_metric = torch_fidelity("metric_kid").kid_features_to_metric
    options = {"kid_subsets": 20, "kid_subset_size": 100, "verbose": False}
    theirs = features_to_metric(torch.tensor(A), torch.tensor(B), **options)
    ours = kernel_inception_distance(A, B, subsets=20, subset_size=100)
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert ours.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-4)
    theirs = features_to_metric(torch.tensor(A), torch.tensor(B), rng_seed=7, **options)
    other = kernel_inception_distance(A, B, subsets=20, subset_size=100, seed=7)
    assert other.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4) != ours.mean
    assert abs(ours.mean - kernel_distance(A, B)) < 3 * ours.std / np.sqrt(20)


def test_blocks_change_nothing(monkeypatch):
    whole = kernel_distance(A, B), cmmd(A, B)
    monkeypatch.setattr(kid, "_BLOCK", 900)
    assert (kernel_distance(A, B), cmmd(A, B)) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "subsets of 1000 rows, and the sets have 300 and 250"),
        ({"subset_size": 1}, "at least 1 subset of at least 2 rows"),
        ({"subsets": 0}, "at least 1 subset of at least 2 rows"),
        ({"seed": -1}, r"a seed in \[0, 2\^32\)"),
    ],
)
def test_bad_subsets(options, message):
    with pytest.raises(ValueError, match=message):
        kernel_inception_distance(A, B, **options)


def test_cmmd_equals_the_published_formula():
    """The kernel over all pairs of normalised rows, as the published program writes it, with torch."""
    x, y = (torch.tensor(unit(z)) for z in (A, B))

    def mean(p, q):
        squares = (p * p).sum(1)[:, None] + (q * q).sum(1)[None] - 2 * p @ q.T
        return torch.exp(-squares / (2 * 10**2)).mean()

    theirs = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert cmmd(A, B) == pytest.approx(float(theirs), rel=1e-9) and theirs > 0.01
    x, y = x.float(), y.float()
    assert cmmd(A, B) == pytest.approx(float(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))), abs=1e-3)


def test_cmmd_is_a_distance_of_directions():
    """0 for a set against itself, symmetric, blind to norms, and a closed form for two single directions."""
    assert cmmd(A, A) == pytest.approx(0, abs=1e-9)
    for other in (cmmd(B, A), cmmd(A * 4, B)):
        assert cmmd(A, B) == pytest.approx(other, rel=1e-9)
    up, right = np.tile([[0.0, 2.0]], (3, 1)), np.tile([[1.0, 0.0]], (4, 1))
    assert cmmd(up, right) == pytest.approx(1000 * 2 * (1 - np.exp(-2 / 200)), rel=1e-9)


@pytest.mark.parametrize(
    "a, b, message",
    [
        (A[:1], B, "at least two rows"),
        (A[:0], B, "at least two rows"),
        (A, B[:, :4], "different widths: 32 and 4"),
        (A * np.nan, B, "not finite"),
    ],
)
def test_bad_features_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        cmmd(a, b)
    with pytest.raises(ValueError, match="an embedding is zero"):
        cmmd(A * (np.arange(300) != 7)[:, None], B)
    if len(a) > 1:
        with pytest.raises(ValueError, match=message):
            kernel_inception_distance(a, b, subsets=1, subset_size=200)
