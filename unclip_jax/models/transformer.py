"""The pre-norm transformer shared by CLIP's towers and by the diffusion prior.

x <- x + Attention(LN(x)); x <- x + MLP(LN(x)). Initialisation is CLIP's (Radford et al. 2021, section 2.4 and released code):
attention W^-1/2, both residual projections W^-1/2 (2 layers)^-1/2, the MLP's first layer (2 W)^-1/2; biases zero.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.models.layers import ACTIVATIONS, Dtype, Gather, LayerNorm, attend, hooked


class Attention(nn.Module):
    """Multi-head self-attention with biases.

    Attributes:
      heads: number of heads K; the width must be a multiple of it.
      out_std: standard deviation of the output projection at initialisation.
    """

    heads: int
    out_std: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """(B, L, W), bool mask broadcastable to (B, K, L, L) or None -> (B, L, W)."""
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(f"width {width} is not a multiple of heads {self.heads}")
        dense = lambda name: nn.DenseGeneral(  # noqa: E731
            (self.heads, width // self.heads),
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(width**-0.5),
            name=name,
        )
        out = attend(dense("query")(x), dense("key")(x), dense("value")(x), mask)
        return nn.DenseGeneral(
            width, axis=(-2, -1), dtype=self.dtype, kernel_init=nn.initializers.normal(self.out_std), name="out"
        )(out)


class Block(nn.Module):
    """One residual block: attention, then a two-layer MLP of `mlp_ratio` times the width."""

    heads: int
    layers: int
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, deterministic: bool = True) -> jax.Array:
        """(B, L, W) -> (B, L, W)."""
        width = x.shape[-1]
        out_std = width**-0.5 * (2 * self.layers) ** -0.5
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        h = LayerNorm(dtype=self.dtype, name="ln1")(x)
        x = x + drop(Attention(self.heads, out_std, self.dtype, name="attn")(h, mask))
        h = LayerNorm(dtype=self.dtype, name="ln2")(x)
        h = nn.Dense(int(width * self.mlp_ratio), dtype=self.dtype, kernel_init=nn.initializers.normal((2 * width) ** -0.5), name="fc1")(h)
        h = ACTIVATIONS[self.activation](h)
        h = nn.Dense(width, dtype=self.dtype, kernel_init=nn.initializers.normal(out_std), name="fc2")(h)
        return x + drop(h)


class Transformer(nn.Module):
    """A stack of `layers` blocks named `block_0`, `block_1`, ...

    Attributes:
      layers: number of blocks.
      heads: attention heads K.
      mlp_ratio: hidden width of the MLP over the width.
      activation: `gelu` (exact) or `quick_gelu`.
      dropout: on both residual branches, in [0, 1).
      remat: recompute each block in the backward pass.
      gather: hook on each block's parameters (see `layers.hooked`).
    """

    layers: int
    heads: int
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    dropout: float = 0.0
    remat: bool = False
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None, deterministic: bool = True) -> jax.Array:
        """(B, L, W), bool mask broadcastable to (B, K, L, L) -> (B, L, W)."""
        block = hooked(Block, self.gather, self.remat, static_argnums=(3,))
        for i in range(self.layers):
            x = block(
                heads=self.heads,
                layers=self.layers,
                mlp_ratio=self.mlp_ratio,
                activation=self.activation,
                dropout=self.dropout,
                dtype=self.dtype,
                name=f"block_{i}",
            )(x, mask, deterministic)
        return x


def causal_mask(length: int) -> jax.Array:
    """(1, 1, L, L) bool: position i sees positions 0..i."""
    return jnp.tril(jnp.ones((1, 1, length, length), dtype=bool))
