"""Precision, recall, density and coverage: beside prdc and torch-fidelity, and on sets with known values."""

import numpy as np
import pytest
import torch
from prdc import compute_prdc

from tests.fidelity import torch_fidelity
from unclip_jax.metrics import precision_recall
from unclip_jax.metrics.precision_recall import prdc

RNG = np.random.default_rng(0)
REAL = RNG.normal(size=(400, 8)).astype(np.float32) + 3
FAKE = RNG.normal(size=(300, 8)).astype(np.float32) * 0.9 + 3.2


@pytest.mark.parametrize("k", [1, 3, 5])
def test_values_of_the_references(k, capsys):
    """The very numbers of prdc, and for precision and recall those of torch-fidelity."""
    theirs = compute_prdc(REAL, FAKE, nearest_k=k)
    ours = prdc(REAL, FAKE, neighbours=k, dense_neighbours=k)
    assert ours._asdict() == pytest.approx(theirs, abs=1e-12)
    assert 0.1 < ours.recall < ours.precision < 1 and 0.1 < ours.coverage < 1
    part = torch_fidelity("metric_prc").calculate_precision_recall_part
    assert part(torch.tensor(FAKE), torch.tensor(REAL), k) == pytest.approx(ours[:2], abs=1e-6)


def test_blocks_and_far_sets(monkeypatch):
    """Small blocks change nothing. Nor do features far from zero, very large or very small, where distances
    by float32 alone are wrong."""
    whole = prdc(REAL, FAKE)
    monkeypatch.setattr(precision_recall, "_BLOCK", 1000)
    monkeypatch.setattr(precision_recall, "_PAIRS", 64)
    assert prdc(REAL, FAKE) == whole
    real, fake = REAL.astype(np.float64), FAKE.astype(np.float64)
    assert prdc(real + 2.0**20, fake + 2.0**20) == whole
    for factor in (2.0**100, 2.0**-100):
        assert prdc(real * factor, fake * factor) == whole


def test_near_ties_are_exact():
    """Rows on a fine grid have many equal distances; every comparison is the one of exact integers."""
    real, fake = RNG.integers(0, 4, (60, 3)), RNG.integers(0, 4, (50, 3))
    squares = lambda a, b: ((a[:, None] - b[None]) ** 2).sum(axis=-1)
    radius = lambda a, k: np.sort(squares(a, a), axis=1)[:, k]
    cross = squares(real, fake)
    expected = (
        (cross <= radius(real, 3)[:, None]).any(axis=0).mean(),
        (cross <= radius(fake, 3)).any(axis=1).mean(),
        (cross < radius(real, 5)[:, None]).sum() / 5 / 50,
        (cross < radius(real, 5)[:, None]).any(axis=1).mean(),
    )
    assert prdc(real + 77.0, fake + 77.0) == pytest.approx(expected, abs=1e-12)


def test_known_sets():
    """A set against itself gives 1 four times. One repeated row covers nothing but itself."""
    assert prdc(REAL, REAL[RNG.permutation(400)]) == (1, 1, 1, 1)
    assert prdc(REAL, REAL + 1000) == (0, 0, 0, 0)
    collapsed = np.repeat(REAL[:1], 300, axis=0)
    result = prdc(REAL, collapsed)
    assert result.precision == 1 and result.recall == 1 / 400 and 0 < result.coverage < 0.05
    assert result.density > 0 and prdc(collapsed, collapsed) == (1, 1, 0, 0)


@pytest.mark.parametrize(
    "real, fake, message",
    [
        (REAL[:5], FAKE, "more than 5 rows in each set, got 5 and 300"),
        (REAL, FAKE[:1], "more than 5 rows in each set, got 400 and 1"),
        (REAL, FAKE[:0], "more than 5 rows in each set, got 400 and 0"),
        (REAL, FAKE[:, :4], "different widths: 8 and 4"),
        (REAL[0], FAKE, r"must be \(N, D\)"),
        (REAL, FAKE * np.nan, "not finite"),
    ],
)
def test_bad_features_are_refused(real, fake, message):
    with pytest.raises(ValueError, match=message):
        prdc(real, fake)
    with pytest.raises(ValueError, match="at least 1, got 0 and 5"):
        prdc(REAL, FAKE, neighbours=0)
