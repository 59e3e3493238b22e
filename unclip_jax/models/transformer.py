"""The pre-norm transformer shared by CLIP's towers and by both priors.

x <- x + Attention(LN(x)); x <- x + MLP(LN(x)). A block may prepend the keys and values of a context to its
own, as in GLIDE's attention. A cache may hold the keys and values of earlier tokens, for sampling token by
token. Initialisation is CLIP's (Radford et al. 2021, section 2.4 and released code). The standard deviations
are W^-1/2 for attention, W^-1/2 (2 layers)^-1/2 for both residual projections and (2 W)^-1/2 for the MLP's
first layer. Biases are zero.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.errors import InputError
from unclip_jax.models.layers import ACTIVATIONS, Dtype, Gather, LayerNorm, attend, checkpoint, with_hooks


class KeysValues(NamedTuple):
    """Keys and values of one layer, each (B, P, K, D)."""

    keys: jax.Array
    values: jax.Array


class Attention(nn.Module):
    """Multi-head self-attention with biases.

    Attributes:
      heads: number of heads K; the width must be a multiple of it.
      key_bias: whether the keys have a bias. It changes nothing that is computed, but files hold it or not.
      out_std: standard deviation of the output projection at initialisation.
    """

    heads: int
    out_std: float
    dtype: Dtype = jnp.float32
    key_bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        context: jax.Array | None = None,
        cache: KeysValues | None = None,
        index: jax.Array | int = 0,
    ) -> tuple[jax.Array, KeysValues]:
        """(B, L, W) -> (B, L, W), and the keys and values it attended to.

        Args:
          x: (B, L, W) the sequence.
          mask: bool, broadcastable to (B, K, L, P) for P keys, or None.
          context: (B, Lc, Wc) tokens whose keys and values precede those of the sequence (P = Lc + L).
          cache: keys and values of P slots, which already hold those of the context and of earlier tokens.
            `context` is then not used.
          index: the slot of the cache from which the sequence's keys and values are written.
        """
        width = x.shape[-1]
        if width % self.heads:
            raise InputError(f"width {width} is not a multiple of heads {self.heads}")
        dense = lambda name: nn.DenseGeneral(
            (self.heads, width // self.heads),
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(width**-0.5),
            use_bias=name != "key" or self.key_bias,
            name=name,
        )
        q, k, v = dense("query")(x), dense("key")(x), dense("value")(x)
        if cache is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new, index, axis=1)
                for old, new in zip(cache, (k, v))
            )
        elif context is not None:
            context = context.astype(self.dtype)
            k = jnp.concatenate([dense("context_key")(context), k], axis=1)
            v = jnp.concatenate([dense("context_value")(context), v], axis=1)
        out = nn.DenseGeneral(
            width,
            axis=(-2, -1),
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(self.out_std),
            name="out",
        )(attend(q, k, v, mask))
        return out, KeysValues(k, v)


class Block(nn.Module):
    """One residual block: attention, then a two-layer MLP of `mlp_ratio` times the width."""

    heads: int
    layers: int
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    key_bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        deterministic: bool = True,
        context: jax.Array | None = None,
        cache: KeysValues | None = None,
        index: jax.Array | int = 0,
    ) -> tuple[jax.Array, KeysValues]:
        """(B, L, W) -> (B, L, W), and the layer's keys and values. The arguments are those of `Attention`."""
        width = x.shape[-1]
        out_std = width**-0.5 * (2 * self.layers) ** -0.5
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        h = LayerNorm(dtype=self.dtype, name="ln1")(x)
        attention = Attention(self.heads, out_std, self.dtype, self.key_bias, name="attn")
        h, keys_values = attention(h, mask, context, cache, index)
        x = x + drop(h)
        h = LayerNorm(dtype=self.dtype, name="ln2")(x)
        hidden = round(width * self.mlp_ratio)
        h = nn.Dense(
            hidden, dtype=self.dtype, kernel_init=nn.initializers.normal((2 * width) ** -0.5), name="fc1"
        )(h)
        h = ACTIVATIONS[self.activation](h)
        h = nn.Dense(width, dtype=self.dtype, kernel_init=nn.initializers.normal(out_std), name="fc2")(h)
        return x + drop(h), keys_values


class Transformer(nn.Module):
    """A stack of `layers` blocks named `block_0`, `block_1`, ...

    Attributes:
      layers: number of blocks.
      heads: attention heads K.
      mlp_ratio: hidden width of the MLP over the width.
      activation: `gelu` (exact) or `quick_gelu`.
      dropout: on both residual branches, in [0, 1).
      remat: what each block recomputes in the backward pass (`layers.checkpoint`).
      scan: runs the blocks as one loop over their parameters, which are stacked before the loop. The compile
      time
        then does not grow with depth. Names and results are the same, except the noise of dropout. The loop
        is slower on CPU. Where keys and values are kept, the blocks run one by one.
      gather: hook on each block's parameters (see `layers.with_hooks`).
      key_bias: see `Attention`.
    """

    layers: int
    heads: int
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    dropout: float = 0.0
    key_bias: bool = True
    remat: str = "none"
    scan: bool = False
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        deterministic: bool = True,
        context: jax.Array | None = None,
    ) -> jax.Array:
        """(B, L, W) -> (B, L, W).

        Args:
          x: (B, L, W) the sequence.
          mask: bool, broadcastable to (B, K, L, P) for P = Lc + L keys, or None.
          deterministic: False switches dropout on.
          context: (B, Lc, Wc) or None.
        """
        return self.run(x, mask, deterministic, context, keep=False)[0]

    @nn.compact
    def run(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        deterministic: bool = True,
        context: jax.Array | None = None,
        caches: Sequence[KeysValues] | None = None,
        index: jax.Array | int = 0,
        keep: bool = True,
    ) -> tuple[jax.Array, list[KeysValues]]:
        """As `__call__`; also returns every layer's keys and values, or an empty list unless `keep`.

        The caller passes them as `caches` for the tokens that follow (`Attention`).
        """
        if self.scan and not keep and not self.is_initializing():
            return self._scanned(x, mask, deterministic, context), []
        block = with_hooks(self, Block, self.gather, self.remat, static_argnums=(3,))
        kept = []
        for i in range(self.layers):
            x, layer = block(
                heads=self.heads,
                layers=self.layers,
                mlp_ratio=self.mlp_ratio,
                activation=self.activation,
                dropout=self.dropout,
                dtype=self.dtype,
                key_bias=self.key_bias,
                name=f"block_{i}",
            )(x, mask, deterministic, context, None if caches is None else caches[i], index)
            kept.append(layer)
        return x, kept

    def _scanned(
        self, x: jax.Array, mask: jax.Array | None, deterministic: bool, context: jax.Array | None
    ) -> jax.Array:
        block = Block(
            self.heads, self.layers, self.mlp_ratio, self.activation, self.dropout, self.dtype, self.key_bias,
            parent=None,
        )  # fmt: skip
        params = self.variables["params"]
        stacked = jax.tree.map(
            lambda *layers: jnp.stack(layers), *(params[f"block_{i}"] for i in range(self.layers))
        )
        keys = (
            None
            if deterministic or not self.dropout
            else jax.random.split(self.make_rng("dropout"), self.layers)
        )

        def body(x, layer):
            params, key = layer
            params = params if self.gather is None else self.gather(params)
            rngs = {} if key is None else {"dropout": key}
            return block.apply({"params": params}, x, mask, deterministic, context, rngs=rngs)[0], None

        body = checkpoint(body, functools.partial(jax.checkpoint, body, prevent_cse=False), self.remat)
        return jax.lax.scan(body, x, (stacked, keys))[0]


def causal_mask(length: int) -> jax.Array:
    """(1, 1, L, L) bool: position i sees positions 0..i."""
    return jnp.tril(jnp.ones((1, 1, length, length), dtype=bool))
