"""The codec of the autoregressive prior: quantised principal components of CLIP image embeddings (unCLIP
section 2.2).

The components are ordered by their eigenvalues. Each of the first N projections is divided into `buckets`
equal buckets between the extremes of the fitting data. A code stands for the centre of its bucket, so a
projection inside the extremes is restored to within half a bucket.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Codec(NamedTuple):
    """PCA of embeddings and the range of every projection.

    mean: (D,). components: (D, D), row k is the k-th principal direction. eigenvalues: (D,) variances,
    descending. low, high: (D,) extremes of the projections.
    """

    mean: jax.Array
    components: jax.Array
    eigenvalues: jax.Array
    low: jax.Array
    high: jax.Array


def project(codec: Codec, z: jax.Array, dims: int) -> jax.Array:
    """Raw embeddings (..., D) -> their first `dims` projections (..., dims)."""
    return jnp.einsum("...d,kd->...k", z - codec.mean, codec.components[:dims], precision="highest")


def unproject(codec: Codec, y: jax.Array) -> jax.Array:
    """Projections (..., k) -> raw embeddings (..., D). Exact at k = D."""
    return codec.mean + jnp.einsum("...k,kd->...d", y, codec.components[: y.shape[-1]], precision="highest")


def quantize(codec: Codec, y: jax.Array, buckets: int) -> jax.Array:
    """Projections (..., k) -> codes (..., k) int32 in [0, buckets): beyond the extremes, the nearest."""
    k = y.shape[-1]
    unit = (y - codec.low[:k]) / jnp.maximum(codec.high[:k] - codec.low[:k], 1e-12)
    return jnp.clip(jnp.floor(unit * buckets), 0, buckets - 1).astype(jnp.int32)


def dequantize(codec: Codec, codes: jax.Array, buckets: int) -> jax.Array:
    """Codes (..., k) -> the centres of their buckets (..., k)."""
    k = codes.shape[-1]
    return codec.low[:k] + (codes + 0.5) / buckets * (codec.high[:k] - codec.low[:k])


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosine of corresponding rows (..., D) -> (...): for CLIP embeddings, z_i.z_t after normalisation."""
    norm = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, axis=-1) / jnp.maximum(norm, 1e-8)
