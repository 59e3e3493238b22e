"""Search in an index: equal to NumPy's brute force on any mesh, in bounded memory."""

import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from unclip_jax import sharding
from unclip_jax.data.retrieval_index import RetrievalIndex
from unclip_jax.errors import MissingPackageError
from unclip_jax.generate import neighbours
from unclip_jax.generate.neighbours import Searcher, recall, searcher

D, K = 16, 5


def unit(z):
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def index():
    """1,003 rows in four blocks, three of them equal."""
    rows = np.random.default_rng(0).normal(size=(1003, D)).astype(np.float16)
    rows[500] = rows[900] = rows[3]
    return RetrievalIndex("an index", "clip", "raw", "sum", (rows[:400], rows[400:401], rows[401:]))


@pytest.fixture(scope="module")
def queries(index):
    z = np.random.default_rng(1).normal(size=(37, D)).astype(np.float32)
    return np.concatenate([3 * index.take(np.array([3])), z])


@pytest.mark.parametrize("shape, block", [({"data": 8}, 64), ({"data": 2, "fsdp": 2, "tensor": 2}, 5000)])
def test_search_equals_brute_force(shape, block, index, queries):
    """Over several blocks and in one, with padding in both; of equal rows the first comes first."""
    found, cosines = Searcher(index, sharding.make_mesh(shape), block)(queries, K)
    rows = np.concatenate([np.float64(each) for each in index.blocks])
    similarity = unit(np.float64(queries)) @ unit(rows).T
    wanted = np.argsort(-similarity, axis=1, kind="stable")[:, :K]
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_allclose(cosines, np.take_along_axis(similarity, wanted, axis=1), atol=1e-6)
    assert found[0, :3].tolist() == [3, 500, 900]
    np.testing.assert_array_equal(index.take(found), np.float32(rows[found]))


def test_memory_does_not_grow_with_the_index(index):
    """One program serves every block, at the paper's sizes: its memory is that of one block of cosines.

    An index of 20 million rows is 306 blocks.
    """
    mesh = sharding.make_mesh({"data": 8})
    whole, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec(sharding.AXES)))
    rows = jax.ShapeDtypeStruct((neighbours.BLOCK, 512), "float16", sharding=split)
    queries, *best = (
        jax.ShapeDtypeStruct((neighbours.QUERIES, width), dtype, sharding=whole)
        for width, dtype in ((512, "float32"), (20, "float32"), (20, "int32"))
    )
    program = neighbours._merge(mesh, 20).lower(*best, queries, rows, 0, 7).compile()
    cosines = 4 * neighbours.QUERIES * neighbours.BLOCK // mesh.size
    assert program.memory_analysis().temp_size_in_bytes < 5 * cosines
    keeps = Searcher(index, mesh, 64)
    keeps(np.ones((1, D), np.float32), 1)
    assert len(keeps._placed) == 16  # small enough to stay


def test_a_large_index_is_sent_in_blocks(index, queries, monkeypatch):
    """What is too large to stay on the devices is not kept there, and gives the same."""
    mesh = sharding.make_mesh({"data": 8})
    wanted = Searcher(index, mesh, 64)(queries, K)
    monkeypatch.setattr(neighbours, "RESIDENT", 1000)
    streams = Searcher(index, mesh, 64)
    for a, b in zip(streams(queries, K), wanted):
        np.testing.assert_array_equal(a, b)
    assert not streams._placed


def test_what_is_refused(index, queries):
    search = Searcher(index, sharding.make_mesh({"data": 8}))
    with pytest.raises(ValueError, match="has 1003 rows, so k must be 1 to that, got 1004"):
        search(queries, 1004)
    with pytest.raises(ValueError, match="rows of 16, and the queries 8"):
        search(queries[:, :8], 1)
    with pytest.raises(ValueError, match="unknown search 'fast'"):
        searcher(index, search.mesh, K, "fast")
    found, cosines = search(queries[:0], K)
    assert found.shape == cosines.shape == (0, K)


def test_scann_when_it_is_missing(index, monkeypatch):
    monkeypatch.setitem(sys.modules, "scann", None)
    with pytest.raises(MissingPackageError, match="pip install scann"):
        searcher(index, None, K, "scann")


@pytest.mark.parametrize(
    "rows, tree, quantised", [(100, False, False), (30_000, False, True), (100_000, True, True)]
)
def test_scann_is_built_as_in_the_paper(rows, tree, quantised, monkeypatch):
    """The number of rows chooses brute force, quantised rows, or a tree; all are unit vectors."""
    calls = {}

    class Builder:
        def __getattr__(self, name):
            return lambda *args, **kwargs: calls.__setitem__(name, (args, kwargs)) or self

        def search_batched(self, z, final_num_neighbors):
            np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)
            return np.zeros((len(z), final_num_neighbors), np.uint32), np.ones((len(z), final_num_neighbors))

    def builder(unit_rows, k, distance):
        np.testing.assert_allclose(np.linalg.norm(unit_rows[:50], axis=1), 1, rtol=1e-3)
        calls["builder"] = k, distance
        return Builder()

    fake = SimpleNamespace(scann_ops_pybind=SimpleNamespace(builder=builder))
    monkeypatch.setitem(sys.modules, "scann", fake)
    block = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float16)
    search = searcher(RetrievalIndex("x", "c", "raw", "s", (block,)), None, 20, "scann")
    found, _ = search(2 * np.ones((3, 4)), 4)
    assert found.shape == (3, 4) and calls["builder"] == (20, "dot_product")
    assert (
        (("tree" in calls), ("score_ah" in calls)) == (tree, quantised) != ("score_brute_force" in calls, 0)
    )
    if tree:
        assert calls["tree"] == ((316, 15), {"training_sample_size": 10_000})
    if quantised:
        assert calls["score_ah"] == ((2,), {"anisotropic_quantization_threshold": 0.2})
        assert calls["reorder"] == ((40,), {})


def test_scann_finds_nearly_all(index, queries):
    pytest.importorskip("scann")
    mesh = sharding.make_mesh({"data": 8})
    found = searcher(index, mesh, K, "scann")(queries, K)[0]
    assert recall(found, Searcher(index, mesh)(queries, K)[0]) > 0.9


def test_recall():
    assert recall(np.array([[1, 2], [3, 4]]), np.array([[2, 1], [4, 7]])) == 0.75
