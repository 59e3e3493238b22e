"""The space in which CLIP embeddings are diffused: a named, invertible, affine normalisation.

raw        z
unit       z / |z|                       (not invertible: the norm is lost; kept for networks trained on unit
vectors) scaled     k z / |z|                     (the paper: k = 17.2 at D = 1024, unCLIP appendix C)
whitened   (z - mean) / std, per dimension over training embeddings (Karlo)

The configuration of a part names its space and the CLIP that made the embeddings. Parts of different spaces
must not be combined.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from unclip_jax.errors import InputError

KINDS = ("raw", "unit", "scaled", "whitened")


class EmbeddingSpace(NamedTuple):
    """A normalisation.

    kind: one of `KINDS`; scale: the k of `scaled`; mean, std: (D,) float32 of `whitened`, None otherwise.
    """

    kind: str
    scale: float = 1.0
    mean: jax.Array | None = None
    std: jax.Array | None = None


def normalize(space: EmbeddingSpace, z: jax.Array) -> jax.Array:
    """Raw embeddings (..., D) -> the space.

    Raises:
      ValueError: on an unknown kind.
    """
    if space.kind == "raw":
        return z
    if space.kind in ("unit", "scaled"):
        return space.scale * z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1e-8)
    if space.kind == "whitened":
        return (z - space.mean) / space.std
    raise InputError(f"unknown embedding space {space.kind!r}; choose one of {', '.join(KINDS)}")


def denormalize(space: EmbeddingSpace, z: jax.Array) -> jax.Array:
    """The space -> embeddings (..., D): raw for `raw` and `whitened`, unit-norm for `unit` and `scaled`."""
    if space.kind == "raw":
        return z
    if space.kind in ("unit", "scaled"):
        return z / space.scale
    if space.kind == "whitened":
        return z * space.std + space.mean
    raise InputError(f"unknown embedding space {space.kind!r}; choose one of {', '.join(KINDS)}")
