"""Means and covariances in float64: from a stream and on a mesh, beside NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.metrics import mesh_moments
from unclip_jax.metrics.moments import empty, merge, moments, remarks, update
from unclip_jax.sharding import make_mesh, shard_batch

RNG = np.random.default_rng(0)
FAR = (RNG.normal(size=(203, 16)) + 1000 * RNG.normal(size=16)).astype(np.float32)  # far from 0, float32


def close(stats, features):
    x = features.astype(np.float64)
    cov = np.cov(x, rowvar=False)
    assert stats.count == len(x)
    np.testing.assert_allclose(stats.mean, x.mean(axis=0), rtol=1e-12)
    assert np.abs(stats.cov - cov).max() <= 1e-12 * np.abs(cov).max()


def test_a_stream_equals_numpy(monkeypatch):
    """Whole, in blocks, row by row, and joined from two halves; also far from zero, where sums of squares
    would lose half of the digits."""
    close(moments(FAR), FAR)
    monkeypatch.setattr("unclip_jax.metrics.moments._ROWS", 50)
    close(moments(FAR), FAR)
    sums = empty(16)
    for row in FAR:
        sums = update(sums, row[None])
    close(moments(sums), FAR)
    close(moments(merge(update(empty(16), FAR[:70]), update(empty(16), FAR[70:]))), FAR)
    none = update(empty(16), FAR[:0])
    assert none.count == 0 and merge(none, sums) is sums and merge(sums, none) is sums


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_mesh_equals_numpy(shape):
    """Padded batches of float32 on a mesh, the last one with no row at all, sum up to NumPy's float64, and
    every other program keeps its precision."""
    mesh = make_mesh(shape)
    step, sums = mesh_moments.mesh_update(mesh), empty(16)
    for first in range(0, 256, 64):
        rows = FAR[first : first + 64]
        padded = np.full((64, 16), np.nan, np.float32)
        padded[: len(rows)] = rows
        batch = shard_batch({"x": padded, "mask": np.arange(64) < len(rows)}, mesh, whole=True)
        sums = step(sums, batch["x"], batch["mask"])
    assert sums.scatter.dtype == np.float64 and sums.scatter.sharding.is_fully_replicated
    gathered = mesh_moments.gather(sums)
    close(moments(gathered), FAR)
    close(moments(update(gathered, FAR[:9])), np.concatenate([FAR, FAR[:9]]))
    assert jnp.zeros(1).dtype == jnp.float32 and not jax.config.jax_enable_x64
    nan = np.full((8, 16), np.nan, np.float32)
    batch = shard_batch({"x": nan, "mask": np.ones(8, bool)}, mesh, whole=True)
    with pytest.raises(ValueError, match="not finite"):
        mesh_moments.gather(step(gathered, batch["x"], batch["mask"]))


@pytest.mark.parametrize(
    "features, message",
    [
        (np.zeros((1, 3)), "at least two rows of features, got 1"),
        (np.zeros((0, 3)), "at least two rows of features, got 0"),
        (np.zeros(3), r"must be \(N, D\), got the shape \(3,\)"),
        (np.array([[1.0, np.inf], [0, 0]]), "not finite"),
    ],
)
def test_bad_features(features, message):
    with pytest.raises(ValueError, match=message):
        moments(features)


def test_bad_widths():
    with pytest.raises(ValueError, match=r"must be \(N, 4\), got the shape \(5, 3\)"):
        update(empty(4), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="widths 4 and 3"):
        merge(empty(4), empty(3))


def test_remarks():
    """Equal rows and too few rows are said; an unknown number of rows is not guessed."""
    few = moments(FAR[:16])
    assert remarks("a", moments(FAR)) == [] and remarks("a", few._replace(count=None)) == []
    assert "a: 16 rows of 16 features give a singular covariance" in remarks("a", few)[0]
    assert "all rows of features are equal" in remarks("a", moments(np.full((40, 3), 0.1, np.float32)))[0]
