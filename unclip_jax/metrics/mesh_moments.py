"""The mean and the covariance of features that lie on a mesh, accumulated there in float64.

step = mesh_update(mesh)
sums = empty(D)
for features, mask in batches:
    sums = step(sums, features, mask)
stats = moments(gather(sums))
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unclip_jax.errors import InputError
from unclip_jax.metrics.moments import Sums
from unclip_jax.sharding import BATCH


def mesh_update(mesh: Mesh) -> Callable[[Sums, jax.Array, jax.Array], Sums]:
    """Returns `moments.update` for features that lie on a mesh: (sums, features, mask) -> sums.

    The sums stay on the mesh, replicated, in float64, until `gather` fetches them. Other programs keep their
    precision: only this one is traced with 64-bit types. TPUs have no float64 of their own and emulate it;
    that is slow beside their matrix units, and still nothing beside a feature network.

    The function takes:
      sums: from `moments.empty` or from an earlier call. A call may reuse the memory of sums on the mesh, so
        use each of them once.
      features: (B, D) on the mesh, split by rows; float32, bfloat16 or float64.
      mask: (B,) bool, False for rows that only pad the batch. Their features may be anything, also NaN.
    """
    replicated = NamedSharding(mesh, P())
    program = _program(replicated, NamedSharding(mesh, BATCH))

    def step(sums: Sums, features: jax.Array, mask: jax.Array) -> Sums:
        with jax.enable_x64(True):
            count, mean, scatter = (
                x if isinstance(x, jax.Array) else jax.device_put(np.asarray(x, np.float64), replicated)
                for x in sums
            )
            return Sums(*program(count, mean, scatter, features, mask))

    return step


def gather(sums: Sums) -> Sums:
    """Sums from the mesh as NumPy arrays.

    Raises:
      ValueError: when a feature was not finite.
    """
    count, mean, scatter = int(np.asarray(sums.count)), np.asarray(sums.mean), np.asarray(sums.scatter)
    if not (np.isfinite(mean).all() and np.isfinite(scatter).all()):
        raise InputError("a feature is not finite")
    return Sums(count, mean, scatter)


@functools.cache
def _program(replicated: NamedSharding, rows: NamedSharding) -> Callable:
    def step(count, mean, scatter, features, mask):
        keep = mask[:, None]
        x = jnp.where(keep, features.astype(jnp.float64), 0)
        more = mask.sum(dtype=jnp.float64)
        centre = x.sum(axis=0) / jnp.maximum(more, 1)
        centred = jnp.where(keep, x - centre, 0)
        total = jnp.maximum(count + more, 1)
        shift = centre - mean
        outer = jnp.outer(shift, shift) * (count * more / total)
        own = jnp.matmul(centred.T, centred, precision=jax.lax.Precision.HIGHEST)
        return count + more, mean + shift * (more / total), scatter + own + outer

    return jax.jit(
        step,
        in_shardings=(replicated, replicated, replicated, rows, rows),
        out_shardings=(replicated, replicated, replicated),
        donate_argnums=(0, 1, 2),
    )
