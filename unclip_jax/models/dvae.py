"""The discrete VAE of DALL-E: images to a grid of codes, and back (Ramesh et al. 2021, section 2.1, app. A).

The encoder gives the logits of a categorical distribution over K codes at each position. Training draws
relaxed one-hot codes (Gumbel-softmax) for the decoder; later the most probable code is taken. The decoder
gives the mean and the log scale of a logit-Laplace distribution for each value of a pixel.

    block    id_path(x) + gain * conv(relu(conv(relu(conv(relu(conv(relu(x)))))))), gain = 1 / blocks^2, with
             blocks those of the whole encoder or decoder
    pixels   phi(x) = 0.8 x + 0.1 for x in [0, 1] (equation 3), because the distribution lies on (0, 1)

Shape letters: B batch, H W height width of the image, h w those of the codes, K codes, C channels.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.errors import InputError
from unclip_jax.models.layers import Dtype, Gather, with_hooks
from unclip_jax.models.unet import upsample

EPSILON = 0.1  # of phi


def map_pixels(image: jax.Array) -> jax.Array:
    """Values in [-1, 1] -> phi of them as values in [0, 1]: in [0.1, 0.9]."""
    return (1.0 - 2.0 * EPSILON) * 0.5 * (image + 1.0) + EPSILON


def unmap_pixels(pixels: jax.Array) -> jax.Array:
    """The inverse of `map_pixels`, clipped to [-1, 1]."""
    return jnp.clip(2.0 * (pixels - EPSILON) / (1.0 - 2.0 * EPSILON) - 1.0, -1.0, 1.0)


def logit_laplace(pixels: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """-log of the logit-Laplace density (equation 2), element by element, in nats.

    f(x) = exp(-|logit x - mu| / b) / (2 b x (1 - x)): a Laplace distribution pushed through a sigmoid.

    Args:
      pixels: x in (0, 1).
      mean, log_scale: mu and log b.
    """
    logit = jnp.log(pixels) - jnp.log1p(-pixels)
    distance = jnp.abs(logit - mean) * jnp.exp(-log_scale)
    return distance + log_scale + jnp.log(2.0 * pixels * (1.0 - pixels))


def kl_to_uniform(logits: jax.Array) -> jax.Array:
    """KL(q || uniform) in nats of categorical distributions with logits (..., K) -> (...)."""
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.sum(jnp.exp(log_q) * log_q, axis=-1) + jnp.log(logits.shape[-1])


class Block(nn.Module):
    """The residual block; `kernels` are the sides of its four convolutions.

    Attributes:
      channels: of the output; a quarter of them inside.
      gain: what the residual is multiplied by.
    """

    channels: int
    gain: float
    kernels: tuple[int, ...]
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, channels)."""
        conv, h = functools.partial(_conv, self.dtype), x
        for i, kernel in enumerate(self.kernels):
            width = self.channels if i == len(self.kernels) - 1 else self.channels // 4
            h = conv(width, kernel, f"conv{i + 1}")(nn.relu(h))
        if x.shape[-1] != self.channels:
            x = conv(self.channels, 1, "skip")(x)
        return x + self.gain * h


def _conv(dtype: Dtype, features: int, kernel: int, name: str) -> nn.Conv:
    start = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    pad = kernel // 2
    return nn.Conv(features, (kernel, kernel), padding=pad, dtype=dtype, kernel_init=start, name=name)


class Coder(nn.Module):
    """What encoder and decoder share: groups of blocks under the two hooks.

    Attributes:
      out_channels: of the last convolution.
      channels, levels, level_blocks: see `DVAE`.
    """

    out_channels: int
    channels: int
    levels: int
    level_blocks: int
    remat: str = "none"
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    def group(self, h: jax.Array, number: int, width: int, kernels: tuple[int, ...]) -> jax.Array:
        """The blocks of a group."""
        block = with_hooks(self, Block, self.gather, self.remat)
        gain = 1.0 / (self.levels * self.level_blocks) ** 2
        for i in range(self.level_blocks):
            name = f"block_{number * self.level_blocks + i}"
            h = block(width, gain, kernels, self.dtype, name=name)(h)
        return h


class Encoder(Coder):
    """Image -> logits: a 7x7 convolution, groups with maximum pooling between them, a 1x1 convolution."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, 3) in [0.1, 0.9] -> (B, h, w, out_channels) float32."""
        h = _conv(self.dtype, self.channels, 7, "conv_in")(x.astype(self.dtype))
        for number in range(self.levels):
            h = self.group(h, number, self.channels * 2**number, (3, 3, 3, 1))
            if number < self.levels - 1:
                h = nn.max_pool(h, (2, 2), (2, 2))
        return _conv(jnp.float32, self.out_channels, 1, "conv_out")(nn.relu(h).astype(jnp.float32))


class Decoder(Coder):
    """Shares of codes -> the parameters of the pixels' distribution; `embed_dim` is the first width."""

    embed_dim: int = 128

    @nn.compact
    def __call__(self, shares: jax.Array) -> jax.Array:
        """(B, h, w, K) -> (B, H, W, out_channels) float32."""
        h = _conv(jnp.float32, self.embed_dim, 1, "conv_in")(shares.astype(jnp.float32)).astype(self.dtype)
        for number in range(self.levels):
            h = self.group(h, number, self.channels * 2 ** (self.levels - 1 - number), (1, 3, 3, 3))
            if number < self.levels - 1:
                h = upsample(h)
        return _conv(self.dtype, self.out_channels, 1, "conv_out")(nn.relu(h)).astype(jnp.float32)


class DVAE(nn.Module):
    """The discrete VAE.

    Attributes:
      channels: of the finest group; every coarser one has twice as many (the paper: 256).
      levels: 4; each but one halves the sides.
      level_blocks: blocks of a level (2).
      codes: K (8192).
      embed_dim: width of a code's vector in the decoder (128).
      image_channels: 3 for RGB.
      remat: what each block recomputes in the backward pass (`layers.checkpoint`).
      gather: hook on each block's parameters.
    """

    channels: int = 256
    levels: int = 4
    level_blocks: int = 2
    codes: int = 8192
    embed_dim: int = 128
    image_channels: int = 3
    remat: str = "none"
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    @property
    def factor(self) -> int:
        """Side of the image / side of the codes."""
        return 2 ** (self.levels - 1)

    def setup(self):
        same = {
            "channels": self.channels, "levels": self.levels, "level_blocks": self.level_blocks,
            "remat": self.remat, "dtype": self.dtype, "gather": self.gather,
        }  # fmt: skip
        self.encoder = Encoder(self.codes, **same)
        self.decoder = Decoder(2 * self.image_channels, **same, embed_dim=self.embed_dim)

    def encode(self, image: jax.Array) -> jax.Array:
        """Image (B, H, W, 3) in [-1, 1] -> logits (B, h, w, K) float32.

        Raises:
          ValueError: when the sides are no multiples of `factor`.
        """
        if image.shape[1] % self.factor or image.shape[2] % self.factor:
            sides = f"{image.shape[1]} x {image.shape[2]}"
            raise InputError(f"an image of {sides} has sides that are no multiples of {self.factor}")
        return self.encoder(map_pixels(image))

    def sides(self, image_size: int) -> tuple[int, ...]:
        """The side of the codes of an image of this side: one level, as of a VQ-VAE with several."""
        return (image_size // self.factor,)

    def encode_codes(self, image: jax.Array) -> tuple[jax.Array]:
        """Image (B, H, W, 3) in [-1, 1] -> its most probable codes (B, h, w) int32, of one level."""
        return (jnp.argmax(self.encode(image), axis=-1).astype(jnp.int32),)

    def decode(self, shares: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Shares (B, h, w, K) of codes, one-hot or relaxed -> mean and log scale, (B, H, W, 3) each."""
        mean, log_scale = jnp.split(self.decoder(shares), 2, axis=-1)
        return mean, log_scale

    def decode_codes(self, codes: jax.Array) -> jax.Array:
        """Codes (B, h, w) int32 in [0, K) -> image (B, H, W, 3) in [-1, 1]: the median of each pixel."""
        mean, _ = self.decode(jax.nn.one_hot(codes, self.codes))
        return unmap_pixels(nn.sigmoid(mean))

    def __call__(self, image: jax.Array) -> jax.Array:
        """Image (B, H, W, 3) in [-1, 1] -> its reconstruction from the most probable codes."""
        return self.decode_codes(self.encode_codes(image)[0])
