"""The encoder of T5, versions 1.0 and 1.1 (Raffel et al. 2020; Shazeer 2020 for 1.1's gated MLP).

A pre-norm transformer without biases and without absolute positions:

    x <- x + O softmax(q k^T + b) v;   x <- x + MLP(RMSNorm(x));   out = RMSNorm(x)

Scores are not divided by sqrt(d): the initialisation absorbs it. b is a learned number per head and bucket of
the distance between key and query; the first layer's table serves all layers. Half of the buckets is for keys
before the query and half for those after it. Of each half, one half holds single distances, and the other
grows logarithmically up to `max_distance`.

    MLP of 1.0:  wo relu(wi h)            MLP of 1.1:  wo (gelu_tanh(wi_0 h) * wi_1 h)

T5 was trained in bfloat16, and its activations leave float16's range. The residual stream and `wo` are
therefore float32 in every compute dtype.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.errors import InputError
from unclip_jax.models.layers import Dtype, Gather, with_hooks


def buckets(length: int, count: int, max_distance: int) -> np.ndarray:
    """The bucket of each pair (query, key): int (L, L) in [0, count).

    Args:
      length: L.
      count: number of buckets, both directions together; even.
      max_distance: the distance from which on all keys share the last bucket.
    """
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    half, size = count // 2, np.abs(distance)
    exact = half // 2
    spread = np.log(np.maximum(size, 1).astype(np.float32) / exact) / math.log(max_distance / exact)
    far = np.minimum(exact + (spread * (half - exact)).astype(np.int64), half - 1)
    return np.where(distance > 0, half, 0) + np.where(size < exact, size, far)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * scale, over the last axis, in float32."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., W) -> (..., W)."""
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        return (x * scale).astype(self.dtype)


def dense(features: int | tuple[int, int], name: str, std: float, dtype: Dtype, axis: int | tuple = -1):
    """A linear layer without bias."""
    init = nn.initializers.normal(std)
    return nn.DenseGeneral(features, axis, use_bias=False, dtype=dtype, kernel_init=init, name=name)


class Attention(nn.Module):
    """Attention without biases, scaling and absolute positions."""

    heads: int
    head_dim: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """x (B, L, W), bias (B or 1, K, L, L) float32 with the mask -> (B, L, W)."""
        width, size = x.shape[-1], (self.heads, self.head_dim)
        q = dense(size, "query", (width * self.head_dim) ** -0.5, self.dtype)(x)
        k = dense(size, "key", width**-0.5, self.dtype)(x)
        v = dense(size, "value", width**-0.5, self.dtype)(x)
        scores = jnp.einsum("bqkd,bpkd->bkqp", q, k, preferred_element_type=jnp.float32) + bias
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        h = jnp.einsum("bkqp,bpkd->bqkd", weights, v)
        return dense(width, "out", (self.heads * self.head_dim) ** -0.5, self.dtype, (-2, -1))(h)


class Block(nn.Module):
    """One layer: attention, then the MLP."""

    heads: int
    head_dim: int
    hidden: int
    gated: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """x (B, L, W) float32, bias (B or 1, K, L, L) float32 with the mask -> (B, L, W) float32."""
        width = x.shape[-1]
        h = RMSNorm(self.dtype, name="ln1")(x)
        h = Attention(self.heads, self.head_dim, self.dtype, name="attn")(h, bias)
        x = x + h.astype(jnp.float32)
        h = RMSNorm(self.dtype, name="ln2")(x)
        inner = dense(self.hidden, "fc1", width**-0.5, self.dtype)(h).astype(jnp.float32)
        if self.gated:
            gate = dense(self.hidden, "gate", width**-0.5, self.dtype)(h).astype(jnp.float32)
            inner = jax.nn.gelu(gate, approximate=True) * inner
        else:
            inner = jax.nn.relu(inner)
        return x + dense(width, "fc2", self.hidden**-0.5, jnp.float32)(inner)


class T5Encoder(nn.Module):
    """The encoder.

    Attributes:
      vocab_size: number of token ids.
      width, layers, heads: W, and the number of layers and heads.
      head_dim: channels of a head; heads * head_dim need not be W.
      hidden: width of the MLP.
      gated: the MLP of 1.1.
      buckets, max_distance: of the relative positions.
      remat: what each block recomputes in the backward pass (`layers.checkpoint`).
      scan: not used; the encoder stands frozen under others and its blocks run one by one.
      gather: hook on each block's parameters.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    head_dim: int
    hidden: int
    gated: bool
    buckets: int = 32
    max_distance: int = 128
    remat: str = "none"
    scan: bool = False
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Encodes captions.

        Args:
          tokens: (B, L) int32 in [0, vocab_size).
          mask: (B, L) bool, True on the caption's own tokens and its end token. Every row has one.

        Returns:
          (B, L, W) float32 states; zero where the mask is False.
        """
        if self.buckets % 4:
            raise InputError(f"buckets={self.buckets} must be a multiple of 4")
        table = self.param("token_embedding", nn.initializers.normal(1.0), (self.vocab_size, self.width))
        x = jnp.take(table, tokens, axis=0).astype(jnp.float32)
        bias_init = nn.initializers.normal(self.width**-0.5)
        bias = self.param("position_bias", bias_init, (self.buckets, self.heads))
        chosen = bias[jnp.asarray(buckets(tokens.shape[1], self.buckets, self.max_distance))]
        bias = chosen.astype(jnp.float32).transpose(2, 0, 1)[None]
        bias = jnp.where(mask[:, None, None, :], bias, -1e9)
        block = with_hooks(self, Block, self.gather, self.remat)
        for i in range(self.layers):
            x = block(self.heads, self.head_dim, self.hidden, self.gated, self.dtype, name=f"block_{i}")(
                x, bias
            )
        x = RMSNorm(jnp.float32, name="ln_out")(x)
        return jnp.where(mask[..., None], x, 0.0)
