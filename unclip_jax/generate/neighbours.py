"""The nearest rows of an index by cosine, exactly, on a mesh (Blattmann et al. 2022, section 3.1).

The index is cut into blocks of rows. A block is split over all devices of the mesh. Each device compares the
queries with its rows and keeps its k best; the k best of all devices and of the blocks before are merged. So
memory holds one matrix (queries, rows of a block on a device), however large the index is. Of rows with the
same cosine the first one wins, as in a stable sort.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unclip_jax.data.retrieval_index import RetrievalIndex
from unclip_jax.diffusion.embedding_space import EmbeddingSpace, normalize
from unclip_jax.errors import InputError, MissingPackageError, one_line
from unclip_jax.sharding import AXES

BLOCK = 2**16  # rows of a block
QUERIES = 1024  # queries at a time
RESIDENT = 2**33  # bytes of an index that stay on the devices between calls; a larger one is sent again
SEARCHES = ("exact", "scann")
SAMPLED = 1000  # queries on which recall is measured

Found = tuple[np.ndarray, np.ndarray]  # (B, k) int64 numbers of rows, (B, k) float32 cosines, descending


class Searcher:
    """Exact search in one index. It keeps the rows on the devices where they are small enough.

    Args:
      index: the rows.
      mesh: the devices.
      block: rows of a block; rounded up to a multiple of the devices.
    """

    def __init__(self, index: RetrievalIndex, mesh: Mesh, block: int = BLOCK):
        if len(index) >= 2**31:
            raise InputError(f"{index.name} has {len(index)} rows; a search takes fewer than 2^31")
        self.index, self.mesh = index, mesh
        self.block = -(-min(block, len(index)) // mesh.size) * mesh.size
        self._keeps = len(index) * index.embed_dim * index.blocks[0].dtype.itemsize <= RESIDENT
        self._placed: dict[int, jax.Array] = {}

    def __call__(self, queries: np.ndarray, k: int) -> Found:
        """The k nearest rows of each query (B, D), in any space.

        Raises:
          ValueError: when the index has fewer than k rows, or rows of another size.
        """
        if not 1 <= k <= len(self.index):
            raise InputError(f"{self.index.name} has {len(self.index)} rows, so k must be 1 to that, got {k}")
        if queries.shape[-1] != self.index.embed_dim:
            raise InputError(
                f"{self.index.name} has rows of {self.index.embed_dim}, and the queries {queries.shape[-1]}"
            )
        pieces = [self._some(queries[i : i + QUERIES], k) for i in range(0, len(queries), QUERIES)]
        if not pieces:
            return np.zeros((0, k), np.int64), np.zeros((0, k), np.float32)
        return tuple(np.concatenate(column) for column in zip(*pieces))

    def _some(self, queries: np.ndarray, k: int) -> Found:
        count = len(queries)
        padded = 1 << (count - 1).bit_length()  # few programs for many numbers of queries
        queries = np.concatenate([queries, np.repeat(queries[-1:], padded - count, axis=0)])
        queries = jax.device_put(np.float32(queries), NamedSharding(self.mesh, P()))
        best = jnp.full((padded, k), -jnp.inf), jnp.zeros((padded, k), jnp.int32)
        for first in range(0, len(self.index), self.block):
            valid = min(self.block, len(self.index) - first)
            best = _merge(self.mesh, k)(*best, queries, self._rows(first, valid), first, valid)
        cosines, numbers = best
        return np.asarray(numbers[:count], np.int64), np.asarray(cosines[:count])

    def _rows(self, first: int, valid: int) -> jax.Array:
        if first in self._placed:
            return self._placed[first]
        rows = self.index.rows(first, first + valid)
        if valid < self.block:
            rows = np.concatenate([rows, np.ones((self.block - valid, rows.shape[1]), rows.dtype)])
        placed = jax.device_put(rows, NamedSharding(self.mesh, P(AXES)))
        if self._keeps:
            self._placed[first] = placed
        return placed


@functools.lru_cache(maxsize=16)
def _merge(mesh: Mesh, k: int) -> Callable:
    # (cosines, numbers) of the best so far, queries, a block's rows, the number of its first row, how many of
    # its rows count -> the best with this block.
    unit = functools.partial(normalize, EmbeddingSpace("unit"))

    def merge(cosines, numbers, queries, rows, first, valid):
        here = len(rows)
        product = jnp.matmul(unit(queries), unit(rows.astype(jnp.float32)).T, precision="highest")
        start = jax.lax.axis_index(AXES) * here
        place = start + jnp.arange(here)
        found, at = jax.lax.top_k(jnp.where(place < valid, product, -jnp.inf), min(k, here))
        # Devices come in the order of their rows, behind the blocks before, so that ties keep the first row.
        gather = functools.partial(jax.lax.all_gather, axis_name=AXES, axis=1, tiled=True)
        cosines = jnp.concatenate([cosines, gather(found)], axis=1)
        numbers = jnp.concatenate([numbers, gather(first + start + at)], axis=1)
        cosines, order = jax.lax.top_k(cosines, k)
        return cosines, jnp.take_along_axis(numbers, order, axis=1)

    specs = (P(), P(), P(), P(AXES), P(), P())
    return jax.jit(jax.shard_map(merge, mesh=mesh, in_specs=specs, out_specs=(P(), P()), check_vma=False))


# ------------------------------------------------------------------------------------------ ScaNN
class ScannSearcher:
    """Approximate search with ScaNN, in the settings of the paper's programs.

    Fewer than 20,000 rows are compared one by one, fewer than 100,000 with quantised rows, and more in a tree
    of sqrt(N) leaves, of which a twentieth is searched; 2 k rows are compared again exactly.

    Raises:
      MissingPackageError: when ScaNN is not installed.
    """

    def __init__(self, index: RetrievalIndex, k: int):
        try:
            import scann
        except Exception as error:  # beside another TensorFlow it fails in ways of its own
            raise MissingPackageError(
                f"ScaNN cannot be imported ({one_line(error, 100)}): pip install scann, in an environment "
                "without another TensorFlow, or leave --search scann out for exact search"
            ) from None
        rows = np.float32(index.rows(0, len(index)))
        rows = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
        builder = scann.scann_ops_pybind.builder(rows, k, "dot_product")
        if len(rows) < 20_000:
            builder = builder.score_brute_force()
        else:
            if len(rows) >= 100_000:
                leaves = int(len(rows) ** 0.5)
                builder = builder.tree(leaves, max(leaves // 20, 1), training_sample_size=len(rows) // 10)
            builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(2 * k)
        self._searcher = builder.build()

    def __call__(self, queries: np.ndarray, k: int) -> Found:
        """The k nearest rows of each query (B, D)."""
        queries = np.float32(queries)
        queries = queries / np.linalg.norm(queries, axis=-1, keepdims=True)
        numbers, cosines = self._searcher.search_batched(queries, final_num_neighbors=k)
        return np.int64(numbers), np.float32(cosines)


def check_search(search: str) -> None:
    """Raises ValueError on a search that is not one of `SEARCHES`."""
    if search not in SEARCHES:
        raise InputError(f"unknown search {search!r}; choose one of {', '.join(SEARCHES)}")


def searcher(
    index: RetrievalIndex, mesh: Mesh, k: int, search: str = "exact"
) -> Callable[[np.ndarray, int], Found]:
    """A search of `SEARCHES`. Raises ValueError on another one, MissingPackageError without its package."""
    check_search(search)
    return Searcher(index, mesh) if search == "exact" else ScannSearcher(index, k)


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """The share of the exact neighbours (B, k) that were found (B, k)."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, exact, strict=True)]))
