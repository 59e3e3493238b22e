"""The ADM / GLIDE U-Net, shared by the decoder and the upsamplers (unCLIP section 2.1).

Each level has `res_blocks` residual blocks, followed by one that halves the resolution. The way up mirrors it
with one more block per level, and every block takes a skip connection. Residual blocks are ADM's (Dhariwal
and Nichol 2021, appendix; "scale-shift" in the papers):

    h = conv(resample(silu(norm(x))));  h = norm(h) * (1 + scale(t)) + shift(t);  out = resample(x) +
    zero_conv(dropout(silu(h)))

Without `scale_shift` the time embedding is added before the norm instead: h = norm(h + shift(t)) (the older
form; Karlo's upsamplers).

Attention concatenates projected context tokens (text states and CLIP tokens) to the keys and values of
self-attention, as GLIDE does. Output layers start at zero: a new U-Net returns exactly zero, and its blocks
with equal channels are identities. Resampling is average pooling on the way down and nearest neighbour on the
way up, applied to both branches.

The topology is that of the public Karlo decoder and super-resolution networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.errors import InputError
from unclip_jax.models.layers import Dtype, Gather, TimeMLP, attend, computed_once, with_hooks
from unclip_jax.models.winograd import conv3x3

ZEROS = nn.initializers.zeros_init()


def downsample(x: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, H/2, W/2, C) by 2x2 average pooling."""
    return nn.avg_pool(x, (2, 2), strides=(2, 2))


def upsample(x: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, 2H, 2W, C), nearest neighbour."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


RESAMPLE = {None: lambda x: x, "down": downsample, "up": upsample}


class GroupNorm(nn.Module):
    """Group normalisation: statistics in float32; `groups` groups (32 in the papers), epsilon 1e-5.

    The statistics equal those of flax's GroupNorm. Here they are reduced per channel first and then per
    group, so that channels stay the minor axis. This vectorises; a (..., groups, channels / groups) view of
    the image does not.
    """

    groups: int
    dtype: Dtype = jnp.float32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, ..., C) -> same shape. Raises ValueError when C is not a multiple of the groups."""
        channels = x.shape[-1]
        if channels % self.groups:
            raise InputError(f"{channels} channels are not a multiple of {self.groups} groups")
        scale = self.param("scale", nn.initializers.ones_init(), (channels,))
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
        width = channels // self.groups

        def group_mean(v: jax.Array) -> jax.Array:  # (B, N, C) -> (B, 1, C)
            means = jnp.mean(jnp.mean(v, axis=1).reshape(-1, self.groups, width), axis=-1)
            return jnp.repeat(means, width, axis=-1)[:, None]

        h = x.astype(jnp.float32).reshape(x.shape[0], -1, channels)
        h = h - group_mean(h)
        h = h * (jax.lax.rsqrt(group_mean(jnp.square(h)) + self.epsilon) * scale) + bias
        return h.astype(self.dtype).reshape(x.shape)


class ResBlock(nn.Module):
    """ADM's residual block.

    `resample` is None, "down" or "up". `scale_shift` says how the time embedding enters (module docstring).
    """

    channels: int
    groups: int = 32
    resample: str | None = None
    dropout: float = 0.0
    scale_shift: bool = True
    dtype: Dtype = jnp.float32
    winograd: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array, deterministic: bool = True) -> jax.Array:
        """x (B, H, W, C_in), emb (B, E) -> (B, H', W', channels)."""
        resample = RESAMPLE[self.resample]
        way = conv3x3 if self.winograd else None
        conv = lambda name, init: nn.Conv(
            self.channels,
            (3, 3),
            padding=1,
            dtype=self.dtype,
            kernel_init=init,
            conv_general_dilated=way,
            name=name,
        )
        h = conv("conv1", nn.initializers.lecun_normal())(
            resample(nn.silu(GroupNorm(self.groups, self.dtype, name="norm1")(x)))
        )
        norm2 = GroupNorm(self.groups, self.dtype, name="norm2")
        time = nn.Dense((1 + self.scale_shift) * self.channels, dtype=self.dtype, name="time")(nn.silu(emb))[
            :, None, None
        ]
        if self.scale_shift:
            scale, shift = jnp.split(time, 2, axis=-1)
            h = norm2(h) * (1 + scale) + shift
        else:
            h = norm2(h + time)
        h = conv("conv2", ZEROS)(nn.Dropout(self.dropout, deterministic=deterministic)(nn.silu(h)))
        x = resample(x)
        if x.shape[-1] != self.channels:
            x = nn.Conv(self.channels, (1, 1), dtype=self.dtype, name="skip")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention over positions. Keys and values of the context tokens precede those of the positions."""

    head_channels: int
    groups: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None, context_mask: jax.Array | None) -> jax.Array:
        """x (B, H, W, C), context (B, N, Dc) or None, context_mask (B, N) bool or None -> (B, H, W, C)."""
        b, h, w, c = x.shape
        if c % self.head_channels:
            raise InputError(f"{c} channels are not a multiple of head_channels {self.head_channels}")
        heads = (c // self.head_channels, self.head_channels)
        dense = lambda name: nn.DenseGeneral(heads, dtype=self.dtype, name=name)
        y = GroupNorm(self.groups, self.dtype, name="norm")(x).reshape(b, h * w, c)
        q, k, v = dense("query")(y), dense("key")(y), dense("value")(y)
        mask = None
        if context is not None:
            context_k, context_v = computed_once(
                self, "context", lambda: (dense("context_key")(context), dense("context_value")(context))
            )
            k = jnp.concatenate([context_k, k], axis=1)
            v = jnp.concatenate([context_v, v], axis=1)
            if context_mask is not None:
                mask = jnp.pad(context_mask.astype(bool), ((0, 0), (0, h * w)), constant_values=True)[
                    :, None, None, :
                ]
        out = nn.DenseGeneral(c, axis=(-2, -1), dtype=self.dtype, kernel_init=ZEROS, name="out")(
            attend(q, k, v, mask)
        )
        return x + out.reshape(b, h, w, c)


def run_levels(
    h: jax.Array,
    widths: Sequence[int],
    res_blocks: int,
    *,
    res: Callable[[jax.Array, str, int], jax.Array],
    attention: Callable[[jax.Array, str, int | None], jax.Array],
    down: Callable[[jax.Array, str], jax.Array],
    up: Callable[[jax.Array, str, tuple[int, int]], jax.Array],
) -> jax.Array:
    """Runs the blocks of a U-Net: down the levels, through the middle, and up again with the skips.

    Args:
      h: (B, H, W, C), the first convolution's output.
      widths: channels of each level; level 0 has the sides of `h`.
      res_blocks: residual blocks of a level on the way down; there is one more on the way up.
      res: (x, name, channels) -> a residual block's output.
      attention: (x, name, level) -> an attention block's output, or x where there is none. The level of the
        block in the middle is None.
      down: (x, name) -> x at half the sides.
      up: (x, name, (H, W)) -> x at twice the sides, which shall be H and W.

    Returns:
      (B, H, W, widths[0]).
    """
    skips = [h]
    for level, width in enumerate(widths):
        for i in range(res_blocks):
            h = attention(res(h, f"down_{level}_res_{i}", width), f"down_{level}_attn_{i}", level)
            skips.append(h)
        if level < len(widths) - 1:
            h = down(h, f"down_{level}_pool")
            skips.append(h)

    h = res(h, "middle_res_0", h.shape[-1])
    h = attention(h, "middle_attn", None)
    h = res(h, "middle_res_1", h.shape[-1])

    for level, width in reversed(list(enumerate(widths))):
        for i in range(res_blocks + 1):
            h = res(jnp.concatenate([h, skips.pop()], axis=-1), f"up_{level}_res_{i}", width)
            h = attention(h, f"up_{level}_attn_{i}", level)
        if level > 0:
            h = up(h, f"up_{level}_expand", skips[-1].shape[1:3])
    return h


class UNet(nn.Module):
    """The network shared by decoder and upsamplers.

    Attributes:
      image_size: side of the training images. `attention_resolutions` refer to images of this size. A network
        without attention may be applied at any size that halves evenly.
      out_channels: 3, or 6 with learned variance.
      channels: base width; level i has channels * channel_mult[i].
      channel_mult: one factor per level.
      res_blocks: residual blocks per level.
      attention_resolutions: sides at which every block is followed by attention, e.g. (32, 16, 8).
      middle_attention: attention between the two middle blocks.
      head_channels: channels per attention head.
      groups: groups of the group normalisation; every level's width must be a multiple of it.
      dropout: inside the residual blocks, in [0, 1).
      scale_shift: the time embedding scales and shifts after the norm; False adds it before (Karlo's
        upsamplers).
      remat: what each block recomputes in the backward pass (`layers.checkpoint`).
      winograd: the residual blocks use convolutions with fewer products (`winograd.conv3x3`), for sampling in
        float32 on CPU.
      gather: hook on each block's parameters.
    """

    image_size: int
    out_channels: int
    channels: int
    channel_mult: tuple[int, ...]
    res_blocks: int
    attention_resolutions: tuple[int, ...] = ()
    middle_attention: bool = True
    head_channels: int = 64
    groups: int = 32
    dropout: float = 0.0
    scale_shift: bool = True
    remat: str = "none"
    winograd: bool = False
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        *,
        cond: jax.Array | None = None,
        context: jax.Array | None = None,
        context_mask: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Runs the U-Net.

        Args:
          x: (B, H, W, C_in) noised image, with a low-resolution image concatenated for an upsampler.
          t: (B,) time steps in [0, T).
          cond: (B, 4 * channels) added to the time embedding.
          context: (B, N, Dc) tokens for the attention.
          context_mask: (B, N) bool, True where a token may be attended to.
          deterministic: False switches dropout on (needs the `dropout` RNG).

        Returns:
          (B, H, W, out_channels) float32.

        Raises:
          ValueError: when the sides do not halve evenly at every level.
        """
        levels = len(self.channel_mult)
        if x.shape[1] % 2 ** (levels - 1) or x.shape[2] % 2 ** (levels - 1):
            raise InputError(
                f"a U-Net of {levels} levels needs sides that are multiples of {2 ** (levels - 1)}, "
                f"got {x.shape[1:3]}"
            )
        res_class = with_hooks(self, ResBlock, self.gather, self.remat, static_argnums=(3,))
        attention_class = with_hooks(self, AttentionBlock, self.gather, self.remat)
        emb = TimeMLP(self.channels, 4 * self.channels, self.dtype, name="time")(t)
        if cond is not None:
            emb = emb + cond.astype(self.dtype)
        if context is not None:
            context = context.astype(self.dtype)

        def res(x, name, channels, resample=None):
            block = res_class(
                channels,
                self.groups,
                resample,
                self.dropout,
                self.scale_shift,
                self.dtype,
                self.winograd,
                name=name,
            )
            return block(x, emb, deterministic)

        attends = [self.image_size // 2**level in self.attention_resolutions for level in range(levels)]

        def attention(x, name, level):
            if not (self.middle_attention if level is None else attends[level]):
                return x
            return attention_class(self.head_channels, self.groups, self.dtype, name=name)(
                x, context, context_mask
            )

        h = nn.Conv(self.channels, (3, 3), padding=1, dtype=self.dtype, name="conv_in")(x.astype(self.dtype))
        h = run_levels(
            h,
            [self.channels * mult for mult in self.channel_mult],
            self.res_blocks,
            res=res,
            attention=attention,
            down=lambda x, name: res(x, name, x.shape[-1], "down"),
            up=lambda x, name, sides: res(x, name, x.shape[-1], "up"),
        )
        h = nn.silu(GroupNorm(self.groups, self.dtype, name="norm_out")(h))
        return nn.Conv(
            self.out_channels, (3, 3), padding=1, dtype=self.dtype, kernel_init=ZEROS, name="conv_out"
        )(h).astype(jnp.float32)
