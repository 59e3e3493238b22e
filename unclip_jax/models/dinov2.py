"""DINOv2 (Oquab et al. 2023): a ViT trained without captions or labels, S, B and L, with registers or without
(Darcet et al. 2023). FD-DINOv2 (Stein et al. 2023) compares images by its features.

Blocks are pre-norm, with a learned scale on both residual branches. The feature is the class token after the
last normalisation. The learned positions are those of 37x37 patches; for other images they are resized.
"""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.errors import InputError
from unclip_jax.models.layers import Dtype, Gather, LayerNorm, gelu, with_hooks
from unclip_jax.models.transformer import Attention

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
EPSILON = 1e-6


@functools.cache
def cubic_matrix(size: int, new_size: int, scale: float, antialias: bool) -> np.ndarray:
    """The bicubic resize along one axis as a matrix (new_size, size), float32, as PyTorch computes it.

    Args:
      size, new_size: numbers of values before and after.
      scale: the distance of two new values in old ones; size / new_size unless shifted.
      antialias: whether the filter is widened by the scale. The filter is then Keys' with a = -0.5, cut at
        the ends; without, it is that with a = -0.75, and the ends are repeated.
    """
    a = -0.5 if antialias else -0.75
    width = max(scale, 1.0) if antialias else 1.0

    def filter_(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * a
        return np.where(x < 1, near, np.where(x < 2, far, 0.0))

    centers = (np.arange(new_size) + 0.5) * scale - 0.5
    matrix = np.zeros((new_size, size))
    reach = math.ceil(2 * width) + 1
    for row, center in enumerate(centers):
        places = np.arange(math.floor(center) - reach, math.floor(center) + reach + 1)
        weights = filter_((places - center) / width)
        if antialias:
            inside = (places >= 0) & (places < size)
            places, weights = places[inside], weights[inside] / weights[inside].sum()
        np.add.at(matrix[row], np.clip(places, 0, size - 1), weights)
    return matrix.astype(np.float32)


class Block(nn.Module):
    """x <- x + scale1 * Attention(LN(x)); x <- x + scale2 * MLP(LN(x))."""

    heads: int
    mlp_ratio: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, L, W) -> (B, L, W)."""
        width = x.shape[-1]
        scale = lambda name: self.param(name, nn.initializers.ones, (width,)).astype(self.dtype)
        normal = lambda std: nn.initializers.normal(std)
        h = LayerNorm(EPSILON, dtype=self.dtype, name="ln1")(x)
        h, _ = Attention(self.heads, 0.02, self.dtype, name="attn")(h, None)
        x = x + scale("scale1") * h
        h = LayerNorm(EPSILON, dtype=self.dtype, name="ln2")(x)
        hidden = round(width * self.mlp_ratio)
        h = nn.Dense(hidden, dtype=self.dtype, kernel_init=normal(0.02), name="fc1")(h)
        h = nn.Dense(width, dtype=self.dtype, kernel_init=normal(0.02), name="fc2")(gelu(h))
        return x + scale("scale2") * h


class DINOv2(nn.Module):
    """The whole network.

    Attributes:
      width, layers, heads: of the transformer.
      patch_size: in pixels.
      positions: patches along a side for which positions were learned.
      mlp_ratio: hidden width of the MLP over the width.
      registers: number of tokens that stand beside the patches; None without.
      position_offset: how the positions are resized to n patches along a side. 0: as transformers does, to n
        exactly. The authors' code without registers asks for n + 0.1, which shifts the positions a little.
        With registers the resize is antialiased, in both.
    """

    width: int
    layers: int
    heads: int
    patch_size: int
    positions: int
    mlp_ratio: float = 4.0
    registers: int | None = None
    position_offset: float = 0.0
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """(B, H, W, 3) in [-1, 1] -> (B, width) float32, the class token after the last normalisation.

        Raises:
          ValueError: when a side of the images is not a multiple of the patches' size.
        """
        b, h, w, _ = image.shape
        p = self.patch_size
        if h % p or w % p:
            raise InputError(f"DINOv2 takes images whose sides are multiples of {p} pixels, got {h}x{w}")
        normal = nn.initializers.normal(0.02)
        x = ((image + 1.0) / 2.0 - jnp.asarray(MEAN)) / jnp.asarray(STD)
        x = nn.Conv(
            self.width, (p, p), strides=(p, p), padding="VALID", dtype=self.dtype, name="patch_embed"
        )(x.astype(self.dtype))
        x = x.reshape(b, -1, self.width)
        table = self.param("position_embedding", normal, (1 + self.positions**2, self.width))
        cls = self.param("class_embedding", normal, (self.width,))
        x = x + self._positions(table[1:], h // p, w // p).astype(x.dtype)
        tokens = [(cls + table[0])[None]]
        if self.registers is not None:
            tokens.append(self.param("register_embedding", normal, (self.registers, self.width)))
        first = jnp.concatenate(tokens).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (b, *first.shape)), x], axis=1)
        block = with_hooks(self, Block, self.gather, "none")
        for i in range(self.layers):
            x = block(self.heads, self.mlp_ratio, self.dtype, name=f"block_{i}")(x)
        return LayerNorm(EPSILON, dtype=self.dtype, name="ln_final")(x[:, 0]).astype(jnp.float32)

    def _positions(self, table: jax.Array, rows: int, columns: int) -> jax.Array:
        # (positions^2, W) -> (rows * columns, W)
        side = self.positions
        if (rows, columns) == (side, side):
            return table
        down, across = (
            cubic_matrix(side, new, side / (new + self.position_offset), self.registers is not None)
            for new in (rows, columns)
        )
        square = table.reshape(side, side, self.width)
        return jnp.einsum("hi,wj,ijc->hwc", down, across, square).reshape(-1, self.width)
