"""The U-Net of latent diffusion (Rombach et al. 2022, section 3.3 and appendix E.2), which Stable Diffusion
uses.

It is ADM's U-Net (`unet`) on the latents of an autoencoder, with these differences:

- Attention is a spatial transformer: x + proj_out(blocks(proj_in(norm(x)))), where a block is
  x <- x + self_attention(norm(x)); x <- x + cross_attention(norm(x), context); x <- x + geglu(norm(x)).
  The feed-forward layer is a GEGLU: (a * gelu(g)) W with (a, g) = split(norm(x) V), the exact GELU, and a
  hidden width of 4 C. Keys and values come from the context alone, and all its tokens are seen: there is no
  mask.
- Resolution changes by a convolution of stride 2 with one pixel of padding on each side, and by nearest
  neighbour with a convolution behind it.
- The time embedding is added between the convolutions of a residual block (no scale).

The paper's other networks use parts of ADM in their place: attention without context (`transformer_depth` 0),
residual blocks that resample (`resample` "block"), and scale-shift.

Where the sides do not halve evenly, a level has the larger half, and the way up crops to the skip connection.
The context is the same at every step of a sampler. The collection `fixed` therefore keeps its keys and values
in every attention layer (`layers.computed_once`).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.errors import InputError
from unclip_jax.models.layers import (
    Dtype,
    Gather,
    LayerNorm,
    TimeMLP,
    attend,
    computed_once,
    gelu,
    with_hooks,
)
from unclip_jax.models.unet import ZEROS, AttentionBlock, GroupNorm, ResBlock, run_levels, upsample
from unclip_jax.models.winograd import conv3x3

RESAMPLES = ("conv", "block")


class CrossAttention(nn.Module):
    """Multi-head attention; queries, keys and values have no bias, the output has one."""

    heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """x (B, N, C), context (B, L, Dc) or None for self-attention -> (B, N, C)."""
        channels = x.shape[-1]
        if channels % self.heads:
            raise InputError(f"{channels} channels are not a multiple of {self.heads} heads")
        dense = lambda name: nn.DenseGeneral(
            (self.heads, channels // self.heads), use_bias=False, dtype=self.dtype, name=name
        )
        if context is None:
            keys, values = dense("key")(x), dense("value")(x)
        else:
            keys, values = computed_once(
                self, "context", lambda: (dense("key")(context), dense("value")(context))
            )
        out = attend(dense("query")(x), keys, values)
        return nn.DenseGeneral(channels, axis=(-2, -1), dtype=self.dtype, name="out")(out)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a GEGLU, each with a residual connection (module docstring)."""

    heads: int
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array, deterministic: bool = True) -> jax.Array:
        """x (B, N, C), context (B, L, Dc) -> (B, N, C)."""
        channels = x.shape[-1]
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        norm = lambda i: LayerNorm(dtype=self.dtype, name=f"ln{i}")
        x = x + drop(CrossAttention(self.heads, self.dtype, name="self_attn")(norm(1)(x)))
        x = x + drop(CrossAttention(self.heads, self.dtype, name="cross_attn")(norm(2)(x), context))
        value, gate = jnp.split(nn.Dense(8 * channels, dtype=self.dtype, name="fc1")(norm(3)(x)), 2, axis=-1)
        return x + nn.Dense(channels, dtype=self.dtype, name="fc2")(drop(value * gelu(gate)))


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over the positions of an image, between two projections.

    linear: the projections are linear layers (Stable Diffusion 2), not 1x1 convolutions. They compute the
      same, and have another shape in files.
    """

    heads: int
    depth: int = 1
    groups: int = 32
    linear: bool = False
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array, deterministic: bool = True) -> jax.Array:
        """x (B, H, W, C), context (B, L, Dc) -> (B, H, W, C)."""
        b, h, w, c = x.shape

        def project(x: jax.Array, name: str, init: nn.initializers.Initializer) -> jax.Array:
            if self.linear:
                return nn.Dense(c, dtype=self.dtype, kernel_init=init, name=name)(x)
            return nn.Conv(c, (1, 1), dtype=self.dtype, kernel_init=init, name=name)(x)

        y = GroupNorm(self.groups, self.dtype, 1e-6, name="norm")(x)
        y = project(y, "proj_in", nn.initializers.lecun_normal()).reshape(b, h * w, c)
        for i in range(self.depth):
            y = TransformerBlock(self.heads, self.dropout, self.dtype, name=f"block_{i}")(
                y, context, deterministic
            )
        return x + project(y.reshape(b, h, w, c), "proj_out", ZEROS)


class LatentUNet(nn.Module):
    """The network (module docstring).

    Attributes:
      image_size: side of the latents in training. The network takes other sizes.
      in_channels: of the input: the latents' and those concatenated to them.
      out_channels: of the output.
      channels: base width; level i has channels * channel_mult[i].
      channel_mult: one factor per level.
      res_blocks: residual blocks per level.
      heads: attention heads of each level; the middle has those of the last level.
      attention_levels: the levels whose blocks are followed by attention; the middle always has it.
      context_dim: Dc, width of the context tokens; None for a network without context.
      classes: number of classes. The context is then one token, a row of a learned table; its last row stands
        for no class. None for a context that is given.
      transformer_depth: blocks of each spatial transformer; 0 for ADM's attention without context.
      linear: the transformers' projections are linear layers, not convolutions.
      vector_dim: size of a vector that is added to the time embedding through two layers; None for none.
      resample: "conv" (Stable Diffusion), or "block" for residual blocks that resample.
      groups: groups of the group normalisation.
      dropout: inside the blocks, in [0, 1).
      scale_shift: the time embedding scales and shifts, as in ADM.
      remat: what each block recomputes in the backward pass (`layers.checkpoint`).
      winograd: the residual blocks use convolutions with fewer products, for sampling in float32 on CPU.
      gather: hook on each block's parameters.
    """

    image_size: int
    in_channels: int
    out_channels: int
    channels: int
    channel_mult: tuple[int, ...]
    res_blocks: int
    heads: tuple[int, ...]
    attention_levels: tuple[int, ...] = ()
    context_dim: int | None = None
    classes: int | None = None
    transformer_depth: int = 1
    linear: bool = False
    vector_dim: int | None = None
    resample: str = "conv"
    groups: int = 32
    dropout: float = 0.0
    scale_shift: bool = False
    remat: str = "none"
    winograd: bool = False
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    @property
    def multiple(self) -> int:
        """The sides of the latents must be multiples of this number."""
        return 2 ** (len(self.channel_mult) - 1) if self.resample == "block" else 1

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        *,
        context: jax.Array | None = None,
        label: jax.Array | None = None,
        vector: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Runs the U-Net.

        Args:
          x: (B, H, W, in_channels) noised latents, with what is concatenated to them.
          t: (B,) time steps in [0, T).
          context: (B, L, context_dim) tokens for the cross-attention.
          label: (B,) int32 in [0, classes]; `classes` is no class.
          vector: (B, vector_dim), added to the time embedding.
          deterministic: False switches dropout on (needs the `dropout` RNG).

        Returns:
          (B, H, W, out_channels) float32.

        Raises:
          ValueError: when an input is missing or has another size than the network's.
        """
        if (label is None) != (self.classes is None):
            raise InputError("a U-Net of classes needs a label, and no other takes one")
        if label is not None:
            table = nn.Embed(self.classes + 1, self.context_dim, dtype=self.dtype, name="class_embed")
            context = table(label)[:, None]
        self._check(x, context, vector)
        res_class = with_hooks(self, ResBlock, self.gather, self.remat, static_argnums=(3,))
        transformer = with_hooks(self, SpatialTransformer, self.gather, self.remat, static_argnums=(3,))
        adm_attention = with_hooks(self, AttentionBlock, self.gather, self.remat)
        emb = TimeMLP(self.channels, 4 * self.channels, self.dtype, name="time")(t)
        if self.vector_dim is not None:
            dense = lambda name: nn.Dense(4 * self.channels, dtype=self.dtype, name=name)
            emb = emb + dense("vector_fc2")(nn.silu(dense("vector_fc1")(vector.astype(self.dtype))))
        context = None if context is None else context.astype(self.dtype)

        def res(x: jax.Array, name: str, channels: int, resample: str | None = None) -> jax.Array:
            settings = (self.groups, resample, self.dropout, self.scale_shift, self.dtype, self.winograd)
            return res_class(channels, *settings, name=name)(x, emb, deterministic)

        def attention(x: jax.Array, name: str, level: int | None) -> jax.Array:
            if level is not None and level not in self.attention_levels:
                return x
            heads = self.heads[-1 if level is None else level]
            if self.transformer_depth == 0:
                if x.shape[-1] % heads:
                    raise InputError(f"{x.shape[-1]} channels are not a multiple of {heads} heads")
                block = adm_attention(x.shape[-1] // heads, self.groups, self.dtype, name=name)
                return block(x, None, None)
            settings = (self.transformer_depth, self.groups, self.linear, self.dropout, self.dtype)
            return transformer(heads, *settings, name=name)(x, context, deterministic)

        def conv(x: jax.Array, name: str, channels: int, stride: int = 1, init=None) -> jax.Array:
            return nn.Conv(
                channels,
                (3, 3),
                strides=stride,
                padding=1,
                dtype=self.dtype,
                kernel_init=init or nn.initializers.lecun_normal(),
                conv_general_dilated=conv3x3 if self.winograd and stride == 1 else None,
                name=name,
            )(x)

        def down(x: jax.Array, name: str) -> jax.Array:
            if self.resample == "block":
                return res(x, name, x.shape[-1], "down")
            return conv(x, name, x.shape[-1], stride=2)

        def up(x: jax.Array, name: str, sides: tuple[int, int]) -> jax.Array:
            height, width = sides
            if self.resample == "block":
                return res(x, name, x.shape[-1], "up")[:, :height, :width]
            return conv(upsample(x)[:, :height, :width], name, x.shape[-1])

        h = conv(x.astype(self.dtype), "conv_in", self.channels)
        widths = [self.channels * mult for mult in self.channel_mult]
        h = run_levels(h, widths, self.res_blocks, res=res, attention=attention, down=down, up=up)
        h = nn.silu(GroupNorm(self.groups, self.dtype, name="norm_out")(h))
        return conv(h, "conv_out", self.out_channels, init=ZEROS).astype(jnp.float32)

    def _check(self, x: jax.Array, context: jax.Array | None, vector: jax.Array | None) -> None:
        if self.resample not in RESAMPLES:
            raise InputError(f"unknown resample {self.resample!r}; choose one of {', '.join(RESAMPLES)}")
        levels = len(self.channel_mult)
        if len(self.heads) != levels:
            raise InputError(f"heads must be {levels} numbers, one per level, not {len(self.heads)}")
        if any(not 0 <= level < levels for level in self.attention_levels):
            raise InputError(f"attention_levels must be between 0 and {levels - 1}")
        if x.shape[-1] != self.in_channels:
            raise InputError(f"this U-Net takes {self.in_channels} channels, got {x.shape[-1]}")
        if any(side % self.multiple for side in x.shape[1:3]):
            raise InputError(
                f"a U-Net of {levels} levels whose blocks resample needs sides that are multiples of "
                f"{self.multiple}, got {x.shape[1:3]}"
            )
        if self.transformer_depth and self.context_dim is None:
            raise InputError(
                "a U-Net with transformers needs context_dim; transformer_depth 0 has no context"
            )
        given = None if context is None else context.shape[-1]
        if given != self.context_dim:
            raise InputError(f"this U-Net takes context tokens of {self.context_dim}, got {given}")
        given = None if vector is None else vector.shape[-1]
        if given != self.vector_dim:
            raise InputError(f"this U-Net takes a vector of {self.vector_dim}, got {given}")
