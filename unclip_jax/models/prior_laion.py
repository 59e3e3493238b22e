"""The diffusion prior of DALLE2-pytorch, which LAION trained (unCLIP section 2.2, with changes of its own).

As in `prior_diffusion`, a causal transformer sees the caption's states, z_t, the time step, the noised z_i
and a query, and the query's place predicts the clean z_i. It differs in these:

- All tokens have the embeddings' size D; nothing projects them. Times are looked up in a table. z_t has unit
  length. Learned states take the places behind the end of the caption.
- Attention has one head of keys and values for all heads of queries, and a learned null key and value in
  front of the tokens. The first channels of queries and keys turn with the position (rotary embeddings). A
  learned bias depends on the distance, in buckets as in T5, where the null key counts as a position.
- With `cosine`, queries and keys have unit length, and their product is multiplied by 16. The versions of the
  library before 1.5 divide by the root of the head's size in its place, as usual, and multiply the bias by
  128: their remedy for overflow in half precision divided the product alone.
- The feed-forward layer is a SwiGLU: (a * silu(g)) W with (a, g) = split(norm(x) V). With `normformer` its
  hidden layer is normalised. Norms have a gain and no bias. The last one divides by the largest value first.
- With `null_embeds` (versions from 1.9), learned vectors stand for the caption, z_t and z_i in the
  unconditional half of guidance. The versions before it meant to mask the caption and did not, so they cannot
  be guided.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.errors import InputError
from unclip_jax.models.clip import unit
from unclip_jax.models.layers import Dtype, Gather, with_hooks

EXTRA_TOKENS = 4  # z_t, time, noised z_i, query
COSINE_SCALE = 16.0
BIAS_SCALE = 128.0  # of attention without cosines
BUCKETS, FARTHEST = 32, 128  # of the bias by distance
ROTARY = 32  # channels that turn, at most


class Gain(nn.Module):
    """Layer normalisation with a gain and no bias, epsilon 1e-5, statistics in float32.

    stable: the input is divided by its largest value first.
    """

    stable: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., C) -> (..., C)."""
        x = x.astype(jnp.float32)
        if self.stable:
            x = x / jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))
        mean, var = jnp.mean(x, axis=-1, keepdims=True), jnp.var(x, axis=-1, keepdims=True)
        gain = self.param("gain", nn.initializers.ones_init(), (x.shape[-1],))
        return ((x - mean) * jax.lax.rsqrt(var + 1e-5) * gain).astype(self.dtype)


def distance_buckets(length: int) -> np.ndarray:
    """The bucket of the bias for each query and key, int (n, n + 1); key 0 is the null key.

    Distances below 16 have a bucket each, and larger ones up to 128 share buckets evenly in their logarithm.
    Keys behind the query count as distance 0.
    """
    distance = np.maximum(np.arange(length)[:, None] - np.arange(length + 1)[None], 0)
    exact = BUCKETS // 2
    with np.errstate(divide="ignore"):
        share = np.log(np.float32(distance) / exact) / np.float32(math.log(FARTHEST / exact))
    far = exact + np.where(distance < exact, 0, share * (BUCKETS - exact)).astype(np.int64)
    return np.where(distance < exact, distance, np.minimum(far, BUCKETS - 1))


def rotate(x: jax.Array, channels: int) -> jax.Array:
    """Turns the first `channels` of x (..., L, C) by the position along L; neighbours are pairs."""
    frequencies = 10_000.0 ** (-np.arange(0, channels, 2, dtype=np.float32) / channels)
    angles = jnp.arange(x.shape[-2], dtype=jnp.float32)[:, None] * frequencies
    cos, sin = jnp.repeat(jnp.cos(angles), 2, axis=-1), jnp.repeat(jnp.sin(angles), 2, axis=-1)
    turned, rest = x[..., :channels].astype(jnp.float32), x[..., channels:]
    pairs = turned.reshape(*turned.shape[:-1], channels // 2, 2)
    crossed = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(turned.shape)
    return jnp.concatenate([(turned * cos + crossed * sin).astype(x.dtype), rest], axis=-1)


class LaionBlock(nn.Module):
    """Attention and feed-forward, each with a residual connection (module docstring)."""

    heads: int
    head_dim: int
    hidden: int
    normformer: bool
    rotary: bool
    cosine: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """x (B, n, D), bias (K, n, n + 1), -inf where attention is not allowed -> (B, n, D)."""
        width = x.shape[-1]
        dense = lambda features, name: nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)
        y = Gain(dtype=self.dtype, name="norm1")(x)
        q = dense(self.heads * self.head_dim, "query")(y)
        q = q.reshape(*q.shape[:2], self.heads, self.head_dim).transpose(0, 2, 1, 3)
        k, v = jnp.split(dense(2 * self.head_dim, "key_value")(y), 2, axis=-1)
        if self.rotary:
            channels = min(ROTARY, self.head_dim)
            q, k = rotate(q, channels), rotate(k, channels)
        null = self.param("null_key_value", nn.initializers.normal(1.0), (2, self.head_dim))
        first = jnp.broadcast_to(null[:, None, None].astype(self.dtype), (2, len(x), 1, self.head_dim))
        k, v = jnp.concatenate([first[0], k], axis=1), jnp.concatenate([first[1], v], axis=1)
        scale = self.head_dim**-0.5
        if self.cosine:
            q, k, scale = unit(q), unit(k), COSINE_SCALE
        logits = jnp.einsum("bhid,bjd->bhij", q, k, preferred_element_type=jnp.float32) * scale
        weights = jax.nn.softmax(logits + bias, axis=-1).astype(self.dtype)
        out = jnp.einsum("bhij,bjd->bihd", weights, v)
        out = dense(width, "out")(out.reshape(*out.shape[:2], self.heads * self.head_dim))
        x = x + Gain(dtype=self.dtype, name="norm_out")(out)
        y = Gain(dtype=self.dtype, name="norm2")(x)
        value, gate = jnp.split(dense(2 * self.hidden, "fc1")(y), 2, axis=-1)
        y = value * nn.silu(gate)
        if self.normformer:
            y = Gain(dtype=self.dtype, name="norm_hidden")(y)
        return x + dense(width, "fc2")(y)


class LaionPrior(nn.Module):
    """The network (module docstring).

    Attributes:
      embed_dim: D, of CLIP's embeddings and of its text states.
      length: L, the number of text states.
      num_steps: T, of the table of times.
      layers, heads, head_dim, hidden: of the transformer; hidden is the feed-forward layer's width.
      normformer, rotary, cosine, null_embeds: see the module's docstring.
      norm_in, norm_out, final_projection: whether the transformer begins and ends with a norm, and projects
        its result.
    """

    embed_dim: int
    length: int
    num_steps: int
    layers: int
    heads: int
    head_dim: int
    hidden: int
    normformer: bool = False
    rotary: bool = True
    cosine: bool = True
    null_embeds: bool = True
    norm_in: bool = False
    norm_out: bool = True
    final_projection: bool = True
    remat: str = "none"
    scan: bool = False
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    @nn.compact
    def __call__(
        self,
        z: jax.Array,
        t: jax.Array,
        *,
        text_embed: jax.Array,
        text_states: jax.Array,
        text_mask: jax.Array,
        drop: jax.Array | None = None,
    ) -> jax.Array:
        """Predicts the clean embedding.

        Args:
          z: (B, D) noised image embedding, in the prior's space.
          t: (B,) time steps in [0, T).
          text_embed: (B, D) raw z_t; it is scaled to unit length here.
          text_states: (B, L, D) text tower states. text_mask: (B, L) bool, True on the caption's own tokens.
          drop: (B,) bool, True for the unconditional half of guidance; None for none.

        Returns:
          (B, D) float32, in the prior's space.

        Raises:
          ValueError: when the states have another length or size, or rows are dropped by a network without
            null embeddings.
        """
        b, length, width = text_states.shape
        if (length, width) != (self.length, self.embed_dim):
            raise InputError(
                f"the prior was built for {self.length} text states of {self.embed_dim}, "
                f"got {length} of {width}"
            )
        noise = nn.initializers.normal(1.0)
        null_states = self.param("null_text_states", noise, (self.length, width))
        keep = jnp.ones(b, bool) if drop is None else ~drop
        if self.null_embeds:
            null_text = self.param("null_text_embed", noise, (width,))
            null_image = self.param("null_image_embed", noise, (width,))
            z = jnp.where(keep[:, None], z, null_image)
            text = jnp.where(keep[:, None], unit(text_embed), null_text)
        else:
            if drop is not None:
                raise InputError("this prior has no null embeddings, so it cannot be guided: use scale 1")
            text = unit(text_embed)
        states = jnp.where((text_mask & keep[:, None])[..., None], text_states, null_states)
        times = self.param("time_embedding", noise, (self.num_steps, width))
        query = jnp.broadcast_to(self.param("query", noise, (width,)), (b, width))
        time = jnp.take(times, t.astype(jnp.int32), axis=0)
        tokens = jnp.stack([text, time, z, query], axis=1)
        x = jnp.concatenate([states, tokens], axis=1).astype(self.dtype)

        n = x.shape[1]
        table = self.param("distance_bias", noise, (BUCKETS, self.heads))
        allowed = np.arange(n + 1)[None] <= np.arange(n)[:, None] + 1
        table = table if self.cosine else BIAS_SCALE * table
        bias = jnp.where(allowed, jnp.take(table, distance_buckets(n), axis=0).transpose(2, 0, 1), -jnp.inf)
        if self.norm_in:
            x = Gain(dtype=self.dtype, name="norm_in")(x)
        block = with_hooks(self, LaionBlock, self.gather, self.remat)
        settings = (self.heads, self.head_dim, self.hidden, self.normformer, self.rotary, self.cosine)
        for i in range(self.layers):
            x = block(*settings, self.dtype, name=f"block_{i}")(x, bias)
        x = x[:, -1]
        if self.norm_out:
            x = Gain(stable=True, dtype=self.dtype, name="norm_out")(x)
        if self.final_projection:
            x = nn.Dense(width, use_bias=False, dtype=self.dtype, name="z_out")(x)
        return x.astype(jnp.float32)
