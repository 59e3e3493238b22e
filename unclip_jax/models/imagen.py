"""Imagen: U-Nets conditioned on the states of a frozen T5 (Saharia et al. 2022).

The states are projected and normalised; they are tokens of the U-Net's attention, and their mean is added to
the time embedding. The network of 64 px is ADM's U-Net, unchanged. The upsamplers are the paper's "Efficient
U-Net" (appendix B): it shifts parameters to the low resolutions, where they cost little, and resamples before
the blocks of a level on the way down, and after them on the way up.

    level:   conv stride 2 -> residual blocks (2, 4, 8, 8) -> attention at the lowest one
    skips are scaled by 2^-1/2

An upsampler sees the small image with noise, and how much of it: noise conditioning augmentation (section
2.4; `diffusion.augmentation`).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.errors import InputError
from unclip_jax.models.layers import Dtype, Gather, LayerNorm, TimeMLP, attend, computed_once, with_hooks
from unclip_jax.models.unet import ZEROS, AttentionBlock, GroupNorm, ResBlock, UNet, upsample

ATTENTIONS = ("none", "self", "cross")  # "self": to the image's positions and the text


class TextConditioning(nn.Module):
    """Turns T5's states into a vector for the time embedding and tokens for attention (section 2.2)."""

    cond_dim: int
    context_dim: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, text_states: jax.Array, text_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """text_states (B, L, W), text_mask (B, L) bool -> cond (B, cond_dim), context (B, L, context_dim)."""
        x = nn.Dense(self.context_dim, dtype=self.dtype, name="states_in")(text_states.astype(self.dtype))
        x = LayerNorm(dtype=self.dtype, name="states_norm")(x)
        kept = text_mask[..., None].astype(jnp.float32)
        pooled = jnp.sum(x.astype(jnp.float32) * kept, axis=1) / jnp.maximum(jnp.sum(kept, axis=1), 1)
        pooled = LayerNorm(dtype=self.dtype, name="pooled_norm")(pooled)
        h = nn.silu(nn.Dense(self.cond_dim, dtype=self.dtype, name="pooled_fc1")(pooled))
        return nn.Dense(self.cond_dim, dtype=self.dtype, name="pooled_fc2")(h), x


class CrossAttention(nn.Module):
    """Attention of the positions to the context alone. Every row's context has an allowed token."""

    head_channels: int
    groups: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array, context_mask: jax.Array) -> jax.Array:
        """x (B, H, W, C), context (B, N, Dc), context_mask (B, N) bool -> (B, H, W, C)."""
        b, h, w, c = x.shape
        if c % self.head_channels:
            raise InputError(f"{c} channels are not a multiple of head_channels {self.head_channels}")
        heads = (c // self.head_channels, self.head_channels)
        dense = lambda name: nn.DenseGeneral(heads, dtype=self.dtype, name=name)
        q = dense("query")(GroupNorm(self.groups, self.dtype, name="norm")(x).reshape(b, h * w, c))
        k, v = computed_once(
            self, "context", lambda: (dense("context_key")(context), dense("context_value")(context))
        )
        out = attend(q, k, v, context_mask[:, None, None, :])
        out = nn.DenseGeneral(c, axis=(-2, -1), dtype=self.dtype, kernel_init=ZEROS, name="out")(out)
        return x + out.reshape(b, h, w, c)


class EfficientUNet(nn.Module):
    """The U-Net of the upsamplers (appendix B).

    Attributes:
      image_size: side of the large images in training; the network may be applied at any size that halves
        evenly at every level.
      out_channels: 3, or 6 with learned variance.
      channels: base width; level i has channels * channel_mult[i] at 2^-(i + 1) of the sides.
      channel_mult: one factor per level.
      res_blocks: residual blocks of each level.
      attention: of each level, one of ATTENTIONS.
      head_channels, groups, dropout, remat, winograd, gather: as in `UNet`.
    """

    image_size: int
    out_channels: int
    channels: int
    channel_mult: tuple[int, ...]
    res_blocks: tuple[int, ...]
    attention: tuple[str, ...]
    head_channels: int = 64
    groups: int = 32
    dropout: float = 0.0
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
        cond: jax.Array,
        context: jax.Array,
        context_mask: jax.Array,
        deterministic: bool = True,
    ) -> jax.Array:
        """Runs the U-Net; the arguments are those of `UNet`. Returns (B, H, W, out_channels) float32.

        Raises:
          ValueError: when the levels' settings differ in length, or the sides do not halve evenly.
        """
        levels = len(self.channel_mult)
        if not levels == len(self.res_blocks) == len(self.attention):
            raise InputError("channel_mult, res_blocks and attention need one value for each level")
        if set(self.attention) - set(ATTENTIONS):
            raise InputError(f"attention must be of {', '.join(ATTENTIONS)}, got {self.attention}")
        if x.shape[1] % 2**levels or x.shape[2] % 2**levels:
            raise InputError(
                f"an efficient U-Net of {levels} levels needs sides that are multiples of {2**levels}, "
                f"got {x.shape[1:3]}"
            )
        res_class = with_hooks(self, ResBlock, self.gather, self.remat, static_argnums=(3,))
        self_class = with_hooks(self, AttentionBlock, self.gather, self.remat)
        cross_class = with_hooks(self, CrossAttention, self.gather, self.remat)
        emb = TimeMLP(self.channels, cond.shape[-1], self.dtype, name="time")(t) + cond.astype(self.dtype)
        context = context.astype(self.dtype)
        widths = [self.channels * mult for mult in self.channel_mult]

        def conv(x: jax.Array, width: int, name: str, stride: int = 1) -> jax.Array:
            strides = (stride, stride)
            return nn.Conv(width, (3, 3), strides, padding=1, dtype=self.dtype, name=name)(x)

        def blocks(h: jax.Array, way: str, level: int) -> jax.Array:
            for i in range(self.res_blocks[level]):
                h = res_class(
                    widths[level], self.groups, None, self.dropout, True, self.dtype, self.winograd,
                    name=f"{way}_{level}_res_{i}",
                )(h, emb, deterministic)  # fmt: skip
            kind = self.attention[level]
            if kind == "none":
                return h
            attention = self_class if kind == "self" else cross_class
            return attention(self.head_channels, self.groups, self.dtype, name=f"{way}_{level}_attn_0")(
                h, context, context_mask
            )

        h = first = conv(x.astype(self.dtype), self.channels, "conv_in")
        skips = []
        for level in range(levels):
            h = blocks(conv(h, widths[level], f"down_{level}_pool", 2), "down", level)
            skips.append(h)
        for level in reversed(range(levels)):
            h = jnp.concatenate([h, skips.pop() * 2**-0.5], axis=-1)
            h = blocks(h, "up", level)
            below = widths[level - 1] if level else self.channels
            h = conv(upsample(h), below, f"up_{level}_expand")
        h = jnp.concatenate([h, first * 2**-0.5], axis=-1)
        h = nn.silu(GroupNorm(self.groups, self.dtype, name="norm_out")(h))
        return nn.Conv(
            self.out_channels, (3, 3), padding=1, dtype=self.dtype, kernel_init=ZEROS, name="conv_out"
        )(h).astype(jnp.float32)


class Imagen(nn.Module):
    """P(x | y) at 64 px: ADM's U-Net with T5's states.

    Attributes:
      unet: keyword arguments of `UNet`.
      context_dim: width of the tokens that the attention sees.

    The caption is the same at every step of a sampler; see `Glide`.
    """

    unet: dict
    context_dim: int
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
        text_states: jax.Array,
        text_mask: jax.Array,
        deterministic: bool = True,
    ) -> jax.Array:
        """x (B, H, W, 3) noised, t (B,), text_states (B, L, W), text_mask (B, L) bool -> (B, H, W, 3 or 6)
        float32."""
        width = 4 * self.unet["channels"]
        condition = TextConditioning(width, self.context_dim, self.dtype, name="conditioning")
        cond, context = computed_once(self, "text", lambda: condition(text_states, text_mask))
        hooks = {"remat": self.remat, "winograd": self.winograd, "gather": self.gather}
        return UNet(**self.unet, dtype=self.dtype, name="unet", **hooks)(
            x, t, cond=cond, context=context, context_mask=text_mask, deterministic=deterministic
        )


class ImagenUpsampler(nn.Module):
    """P(x | low_res, y): the efficient U-Net with T5's states and a noised small image.

    Attributes:
      unet: keyword arguments of `EfficientUNet`.
      context_dim: width of the tokens that the attention sees.
    """

    unet: dict
    context_dim: int
    remat: str = "none"
    winograd: bool = False
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    def enlarge(self, low_res: jax.Array, size: tuple[int, int]) -> jax.Array:
        """(B, h, w, 3) -> (B, *size, 3), bilinearly."""
        return jax.image.resize(low_res, (low_res.shape[0], *size, low_res.shape[-1]), "linear")

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        *,
        enlarged: jax.Array,
        augmentation: jax.Array,
        text_states: jax.Array,
        text_mask: jax.Array,
        deterministic: bool = True,
    ) -> jax.Array:
        """As `Imagen`, with `enlarged` (B, H, W, 3), the enlarged small image with noise, and `augmentation`
        (B,) in [0, 1], the level of that noise."""
        width = 4 * self.unet["channels"]
        condition = TextConditioning(width, self.context_dim, self.dtype, name="conditioning")
        cond, context = computed_once(self, "text", lambda: condition(text_states, text_mask))
        level = TimeMLP(self.unet["channels"], width, self.dtype, name="augmentation")(1000 * augmentation)
        hooks = {"remat": self.remat, "winograd": self.winograd, "gather": self.gather}
        return EfficientUNet(**self.unet, dtype=self.dtype, name="unet", **hooks)(
            jnp.concatenate([x, enlarged.astype(x.dtype)], axis=-1), t, cond=cond + level,
            context=context, context_mask=text_mask, deterministic=deterministic,
        )  # fmt: skip
