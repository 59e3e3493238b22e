"""PixelSNAIL: a prior over a grid of codes, one code after another (Chen et al. 2018; VQ-VAE-2, section 3.2).

Codes follow one another row by row. A network of causal convolutions and, if wanted, causal attention sees
the codes before a position and gives the logits of the code at the position.

    codes --> down: the rows above --+--> blocks --> logits
          \\-> right: to the left ----+
    coarser codes --> condition (residual network, sides doubled) --> every residual block
    z_text --> condition --> every residual block

Convolutions have weight normalisation: a kernel is scale * v / |v|, with one scale for each output. Taps on
codes that are not known yet are zero in v, before the norm is taken.

Drawing does not run the whole network for each code. Every causal layer keeps the last rows of its inputs,
and attention its keys and values (collection `cache`); a step computes one position of every layer
(`step`). The normalised kernels are computed once (collection `fixed`).

Shape letters: B batch, H W height width (both `side`), C channels, K codes, D embedding.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.errors import InputError
from unclip_jax.models.layers import Dtype, Gather, attend, computed_once, with_hooks

FIRST = (3, 5)  # rows and columns of codes that the first layers see


class Conv(nn.Module):
    """A convolution with weight normalisation, without padding of its own.

    Attributes:
      features: channels of the output.
      kernel: height and width.
      hidden_taps: of the last row, counted from its end, which see codes that are not known yet.
    """

    features: int
    kernel: tuple[int, int] = (1, 1)
    hidden_taps: int = 0
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H - kernel + 1, W - kernel + 1, features)."""
        shape = (*self.kernel, x.shape[-1], self.features)
        known = jnp.ones((*self.kernel, 1, 1)).at[-1, self.kernel[1] - self.hidden_taps :].set(0.0)
        v = known * self.param("kernel", nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), shape)
        norm = lambda v: jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(v), axis=(0, 1, 2)), 1e-12))
        scale = self.param("scale", lambda key, shape: norm(v), (self.features,))
        weight = computed_once(self, "weight", lambda: (v * (scale / norm(v))).astype(self.dtype))
        x = x.astype(self.dtype)
        if x.shape[1:3] == self.kernel:  # one position: a product, which a CPU does faster than a convolution
            y = jnp.einsum("bhwc,hwcd->bd", x, weight)[:, None, None]
        else:
            y = jax.lax.conv_general_dilated(
                x, weight, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y


class CausalConv(nn.Module):
    """A square convolution that sees the rows above and, in its own row, the positions to the left.

    Attributes:
      features: channels of the output.
      size: of the kernel, odd.
      side: W, for the cache.
    """

    features: int
    size: int
    side: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, column: jax.Array | None = None) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, features). With `column`, x (B, 1, 1, C) is the position in that column
        of the row that is being drawn."""
        half = self.size // 2
        conv = Conv(self.features, (self.size, self.size), half + 1, dtype=self.dtype, name="conv")
        if column is None:
            return conv(jnp.pad(x, ((0, 0), (self.size - 1, 0), (half, half), (0, 0))))
        shape = (len(x), self.size, self.side + 2 * half, x.shape[-1])
        rows = self.variable("cache", "rows", jnp.zeros, shape, self.dtype)
        rows.value = jax.lax.dynamic_update_slice(
            rows.value, x.astype(self.dtype), (0, self.size - 1, column + half, 0)
        )
        return conv(jax.lax.dynamic_slice_in_dim(rows.value, column, self.size, axis=2))


class GatedBlock(nn.Module):
    """x + a * sigmoid(b), with (a, b) two convolutions of x apart (Chen et al. 2018, section 2.2).

    Attributes:
      hidden: width between the convolutions.
      size: of the kernels; 1 for those of a position alone.
      causal: whether they see earlier positions only.
      side: W, for the cache.
      activated_skip: the sum has ELU(x) in place of x. The public PyTorch code activates in place, so its
        weights need this.
    """

    hidden: int
    size: int
    causal: bool = False
    side: int = 0
    dropout: float = 0.0
    activated_skip: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        condition: jax.Array | None = None,
        auxiliary: jax.Array | None = None,
        deterministic: bool = True,
        column: jax.Array | None = None,
    ) -> jax.Array:
        """x (B, H, W, C), condition (B, H, W, Cc), auxiliary (B, H, W, Ca) -> (B, H, W, C)."""

        def conv(features, name, x):
            if self.causal:
                return CausalConv(features, self.size, self.side, self.dtype, name=name)(x, column)
            half = self.size // 2
            padded = jnp.pad(x, ((0, 0), (half, half), (half, half), (0, 0))) if half else x
            return Conv(features, (self.size, self.size), dtype=self.dtype, name=name)(padded)

        active = nn.elu(x)
        h = conv(self.hidden, "conv1", active)
        if auxiliary is not None:
            h = h + Conv(self.hidden, dtype=self.dtype, name="auxiliary")(nn.elu(auxiliary))
        h = nn.Dropout(self.dropout, deterministic=deterministic)(nn.elu(h))
        h = conv(2 * x.shape[-1], "conv2", h)
        if condition is not None:
            h = h + Conv(2 * x.shape[-1], use_bias=False, dtype=self.dtype, name="condition")(condition)
        a, b = jnp.split(h, 2, axis=-1)
        return (active if self.activated_skip else x) + a * nn.sigmoid(b)


class CausalAttention(nn.Module):
    """Attention of each position to all positions before it; the first has nothing to see, and gets zeros.

    Attributes:
      width: of queries, keys and values together.
      heads: number of heads.
      side: H and W, for the cache.
    """

    width: int
    heads: int
    side: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, query: jax.Array, key: jax.Array, n: jax.Array | None = None) -> jax.Array:
        """query (B, H, W, Cq), key (B, H, W, Ck) -> (B, H, W, width). With `n`, both are (B, 1, 1, C) of the
        n-th position."""
        b, h, w, _ = query.shape
        dense = lambda name, x: Conv(self.width, dtype=self.dtype, name=name)(x).reshape(
            b, h * w, self.heads, self.width // self.heads
        )
        q, k, v = dense("query", query), dense("key", key), dense("value", key)
        if n is None:
            total = h * w
            mask, first = jnp.tril(jnp.ones((total, total), bool), -1)[None, None], jnp.arange(total) == 0
        else:
            shape = (b, self.side**2, *k.shape[2:])
            keys = self.variable("cache", "keys", jnp.zeros, shape, self.dtype)
            values = self.variable("cache", "values", jnp.zeros, shape, self.dtype)
            for cache, new in ((keys, k), (values, v)):
                cache.value = jax.lax.dynamic_update_slice(cache.value, new, (0, n, 0, 0))
            k, v = keys.value, values.value
            mask, first = (jnp.arange(self.side**2) < n)[None, None, None], (n == 0)[None]
        out = jnp.where(first[None, :, None, None], 0.0, attend(q, k, v, mask))
        return out.reshape(b, h, w, self.width)


class Block(nn.Module):
    """Causal gated blocks, then attention to all earlier positions, or a projection without attention.

    Attributes: see `PixelSNAIL`.
    """

    side: int
    kernel: int
    res_blocks: int
    res_channels: int
    heads: int
    attention: bool
    dropout: float
    activated_skip: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        background: jax.Array,
        condition: jax.Array | None = None,
        deterministic: bool = True,
        position: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """x (B, H, W, C), background (B, H, W, 2), condition (B, H, W, Cc) -> (B, H, W, C). With `position`
        (n-th of all, column) they are those of one position."""
        n, column = (None, None) if position is None else position
        shared = {"dropout": self.dropout, "activated_skip": self.activated_skip, "dtype": self.dtype}
        width, h = x.shape[-1], x
        for i in range(self.res_blocks):
            block = GatedBlock(self.res_channels, self.kernel, True, self.side, **shared, name=f"res_{i}")
            h = block(h, condition, None, deterministic, column)
        if not self.attention:
            return Conv(width, dtype=self.dtype, name="out")(jnp.concatenate([h, background], axis=-1))
        pointwise = lambda name: GatedBlock(width, 1, **shared, name=name)
        # The public code has activated the block's input in place by now.
        seen = nn.elu(x) if self.activated_skip else x
        key = pointwise("key_res")(jnp.concatenate([seen, h, background], axis=-1), None, None, deterministic)
        query = pointwise("query_res")(jnp.concatenate([h, background], axis=-1), None, None, deterministic)
        attention = CausalAttention(width // 2, self.heads, self.side, self.dtype, name="attn")
        attended = nn.Dropout(self.dropout, deterministic=deterministic)(attention(query, key, n))
        return pointwise("out_res")(h, None, attended, deterministic)


class PixelSNAIL(nn.Module):
    """The prior over one level of a VQ-VAE-2.

    Attributes:
      side: H and W of the grid of codes.
      codes: K.
      channels: width of the blocks.
      kernel: side of the causal kernels, odd.
      blocks: number of blocks.
      res_blocks: gated residual blocks in each.
      res_channels: width inside the gated blocks, and of the condition.
      heads: of the attention.
      attention: whether blocks have attention to all earlier positions.
      dropout: in [0, 1).
      coarse_codes: K of the level above, on which this level is conditioned; None for the top.
      condition_blocks: gated blocks of the network that reads the level above.
      out_blocks: gated blocks behind the others, each of a position alone.
      text_dim: D, of a text embedding on which the prior is conditioned; None without one.
      activated_skip: as in `GatedBlock`.
      remat, gather: hooks on each block (`layers.with_hooks`).
    """

    side: int
    codes: int
    channels: int = 256
    kernel: int = 5
    blocks: int = 4
    res_blocks: int = 4
    res_channels: int = 256
    heads: int = 8
    attention: bool = True
    dropout: float = 0.1
    coarse_codes: int | None = None
    condition_blocks: int = 3
    out_blocks: int = 0
    text_dim: int | None = None
    activated_skip: bool = False
    remat: str = "none"
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    def _network(self, down, right, row, column, background, condition, deterministic, position):
        # Logits from the inputs of the two first layers, windows of one-hot codes, at these rows and columns.
        # Without a row above, or a column to the left, the layer gives 0, and not its bias.
        conv = lambda features, kernel, name: Conv(features, kernel, dtype=self.dtype, name=name)
        down = conv(self.channels, (2, 5), "down")(down) * (row > 0)
        h = down + conv(self.channels, (3, 2), "right")(right) * (column > 0)
        block = with_hooks(self, Block, self.gather, self.remat, (4,)) if position is None else Block
        for i in range(self.blocks):
            h = block(
                self.side, self.kernel, self.res_blocks, self.res_channels, self.heads, self.attention,
                self.dropout, self.activated_skip, self.dtype, name=f"block_{i}",
            )(h, background, condition, deterministic, position)  # fmt: skip
        shared = {"dropout": self.dropout, "activated_skip": self.activated_skip, "dtype": self.dtype}
        for i in range(self.out_blocks):
            block = GatedBlock(self.res_channels, 1, **shared, name=f"out_{i}")
            h = block(h, deterministic=deterministic)
        return Conv(self.codes, dtype=self.dtype, name="logits")(nn.elu(h)).astype(jnp.float32)

    def _background(self) -> jax.Array:
        # Where a position is: (i - H / 2) / H and (j - W / 2) / W.
        axis = (jnp.arange(self.side, dtype=jnp.float32) - self.side / 2) / self.side
        rows, columns = jnp.meshgrid(axis, axis, indexing="ij")
        return jnp.stack([rows, columns], axis=-1)[None].astype(self.dtype)

    def _one_hot(self, codes: jax.Array, size: int) -> jax.Array:
        return jax.nn.one_hot(codes, size, dtype=self.dtype)

    @nn.compact
    def run(
        self,
        codes: jax.Array,
        coarse: jax.Array | None = None,
        text_embed: jax.Array | None = None,
        condition: jax.Array | None = None,
        deterministic: bool = True,
        position: tuple[jax.Array, jax.Array] | None = None,
        only_condition: bool = False,
    ) -> jax.Array | None:
        """What `__call__`, `condition` and `step` share."""
        if condition is None:
            condition = self._condition(coarse, text_embed, deterministic)
        if only_condition:
            return condition
        b = len(codes)
        if position is None:
            seen = self._one_hot(codes, self.codes)
            # Windows of the rows above, and of what is left of the position in this row and those above.
            down = jnp.pad(seen, ((0, 0), (2, 0), (2, 2), (0, 0)))[:, : self.side + 1]
            right = jnp.pad(seen, ((0, 0), (2, 0), (2, 0), (0, 0)))[:, :, : self.side + 1]
            background = jnp.broadcast_to(self._background(), (b, self.side, self.side, 2))
            places = jnp.arange(self.side)
            row, column = places[:, None, None], places[:, None]
            return self._network(down, right, row, column, background, condition, deterministic, None)
        n, column = position
        row = n // self.side
        shape = (b, FIRST[0], self.side + FIRST[1] - 1, self.codes)
        rows = self.variable("cache", "rows", jnp.zeros, shape, self.dtype)
        # `codes` (B,) is the code before this one. It stands to the left, or at the end of the row above.
        before = self._one_hot(codes, self.codes)[:, None, None] * (n > 0)
        place = (2 - (column == 0), jnp.where(column == 0, self.side, column) + 1)
        rows.value = jax.lax.dynamic_update_slice(rows.value, before, (0, *place, 0))
        window = jax.lax.dynamic_slice_in_dim(rows.value, column, FIRST[1], axis=2)
        at = lambda grid: jax.lax.dynamic_slice(grid, (0, row, column, 0), (len(grid), 1, 1, grid.shape[-1]))
        background = jnp.broadcast_to(at(self._background()), (b, 1, 1, 2))
        here = None if condition is None else at(condition)
        down, right = window[:, :2], window[:, :, :2]
        return self._network(down, right, row, column, background, here, True, position)[:, 0, 0]

    def _condition(self, coarse, text_embed, deterministic):
        total = None
        if self.coarse_codes is not None:
            h = self._one_hot(coarse, self.coarse_codes)
            h = jnp.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)))
            h = Conv(self.res_channels, (3, 3), dtype=self.dtype, name="coarse_in")(h)
            for i in range(self.condition_blocks):
                h = GatedBlock(
                    self.res_channels, 3, dropout=self.dropout, activated_skip=self.activated_skip,
                    dtype=self.dtype, name=f"coarse_{i}",
                )(h, deterministic=deterministic)  # fmt: skip
            total = jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)
        if self.text_dim is not None:
            text = nn.Dense(self.res_channels, dtype=self.dtype, name="text_in")(text_embed)[:, None, None]
            shape = (len(text), self.side, self.side, self.res_channels)
            total = jnp.broadcast_to(text if total is None else total + text, shape)
        return total

    def __call__(
        self,
        codes: jax.Array,
        *,
        coarse: jax.Array | None = None,
        text_embed: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits of every code, given the codes before it.

        Args:
          codes: (B, H, W) int32 in [0, K).
          coarse: (B, H / 2, W / 2) int32 codes of the level above, where the prior is conditioned on them.
          text_embed: (B, D) of the captions, where it is conditioned on them.
          deterministic: False switches dropout on (needs the `dropout` RNG).

        Returns:
          (B, H, W, K) float32.

        Raises:
          ValueError: when a side of the codes is not the prior's.
        """
        if codes.shape[1:] != (self.side, self.side):
            raise InputError(
                f"this prior is of {self.side} x {self.side} codes, got {codes.shape[1]} x {codes.shape[2]}"
            )
        return self.run(codes, coarse, text_embed, None, deterministic)

    def condition(
        self, *, coarse: jax.Array | None = None, text_embed: jax.Array | None = None
    ) -> jax.Array | None:
        """What every step of a drawing shares: (B, H, W, res_channels), or None without a condition."""
        return self.run(None, coarse, text_embed, only_condition=True)

    def step(self, before: jax.Array, n: jax.Array, condition: jax.Array | None) -> jax.Array:
        """Logits (B, K) of the n-th code, row by row. It moves the collection `cache`.

        Args:
          before: (B,) int32, the code before it; any for n = 0.
          n: () int32.
          condition: from `condition`.
        """
        return self.run(before, condition=condition, position=(n, n % self.side))


def next_row(cache: dict) -> dict:
    """The cache at the start of a new row: kept rows move up by one, and the last is empty."""

    def move(path, rows):
        if path[-1].key != "rows":
            return rows
        return jnp.concatenate([rows[:, 1:], jnp.zeros_like(rows[:, :1])], axis=1)

    return jax.tree_util.tree_map_with_path(move, cache)
