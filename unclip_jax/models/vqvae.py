"""VQ-VAE-2: images to codes on several levels, and back (Razavi et al. 2019, section 3.1).

Level 0, the bottom, has the most codes: a code stands for 4 x 4 pixels. Every level above it halves the
sides once more. Encoding goes up by convolutions, and comes down again level by level: a level is quantised
after the level above it, whose decoded vectors it sees beside its own features.

    image -> encoder_0 -> encoder_1 -> z_1 -> q_1
                 |                             |
                 +-------> z_0 <- decoder_1 <--+
                            |                  |
                           q_0 -> decoder_0 <- expand_1

One level alone is the VQ-VAE of van den Oord et al. (2017, section 4.1). The codebooks are those of
`models.quantiser`.

Shape letters: B batch, H W height width, h w those of a level, Z width of a vector, K codes, V levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.errors import InputError
from unclip_jax.models.layers import Dtype, Gather, with_hooks
from unclip_jax.models.quantiser import Quantised, init_codebook, quantise, quantise_softly


class Level(NamedTuple):
    """A level of an encoded image: `z` (B, h, w, Z) float32 before the codebook, and what `quantised` of it
    holds."""

    z: jax.Array
    quantised: Quantised


class ResBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))); `hidden` is the width between the convolutions."""

    hidden: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, C)."""
        h = nn.Conv(self.hidden, (3, 3), padding=1, dtype=self.dtype, name="conv1")(nn.relu(x))
        return x + nn.Conv(x.shape[-1], (1, 1), dtype=self.dtype, name="conv2")(nn.relu(h))


class Coder(nn.Module):
    """What encoder and decoder share: their residual blocks, under the two hooks."""

    out_channels: int
    halvings: int
    channels: int
    residual_channels: int
    res_blocks: int
    remat: str = "none"
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    def blocks(self, h: jax.Array) -> jax.Array:
        """The residual blocks and the ReLU behind them."""
        block = with_hooks(self, ResBlock, self.gather, self.remat)
        for i in range(self.res_blocks):
            h = block(self.residual_channels, self.dtype, name=f"block_{i}")(h)
        return nn.relu(h)


class Encoder(Coder):
    """Halves the sides `halvings` times: convolutions 4x4 of stride 2, one 3x3, then the blocks."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H / 2^halvings, W / 2^halvings, out_channels)."""
        h = x.astype(self.dtype)
        for i in range(self.halvings):
            width = self.channels if i else self.channels // 2
            h = nn.Conv(width, (4, 4), strides=2, padding=1, dtype=self.dtype, name=f"pool_{i}")(h)
            h = nn.relu(h)
        h = nn.Conv(self.out_channels, (3, 3), padding=1, dtype=self.dtype, name="conv")(h)
        return self.blocks(h)


class Decoder(Coder):
    """Doubles the sides `halvings` times: a 3x3 convolution, the blocks, then transposed convolutions 4x4."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, h, w, C) -> (B, h 2^halvings, w 2^halvings, out_channels)."""
        h = nn.Conv(self.channels, (3, 3), padding=1, dtype=self.dtype, name="conv")(x.astype(self.dtype))
        h = self.blocks(h)
        for i in reversed(range(self.halvings)):
            width = self.out_channels if i == 0 else self.channels // 2 if i == 1 else self.channels
            h = nn.ConvTranspose(width, (4, 4), strides=(2, 2), dtype=self.dtype, name=f"expand_{i}")(h)
            h = nn.relu(h) if i else h
        return h


class VQVAE(nn.Module):
    """The autoencoder with a codebook on every level.

    Attributes:
      channels: width of encoders and decoders (the paper: 128).
      residual_channels: width inside the residual blocks (the paper: 64; the public code: 32).
      res_blocks: residual blocks of each encoder and decoder (2).
      embed_dim: Z (64).
      codes: K, vectors in each codebook (512).
      levels: V; 2 in VQ-VAE-2 at 256 px, 3 at 1024 px, 1 in VQ-VAE.
      halvings: how often the bottom level halves the sides (2; 3 at 1024 px).
      image_channels: of the image, 3 for RGB.
      remat: what each residual block recomputes in the backward pass (`layers.checkpoint`).
      gather: hook on each block's parameters.
    """

    channels: int = 128
    residual_channels: int = 64
    res_blocks: int = 2
    embed_dim: int = 64
    codes: int = 512
    levels: int = 2
    halvings: int = 2
    image_channels: int = 3
    remat: str = "none"
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    @property
    def factor(self) -> int:
        """Side of the image / side of the top level."""
        return 2 ** (self.halvings + self.levels - 1)

    def sides(self, image_size: int) -> tuple[int, ...]:
        """The sides of the levels of an image of this side, the bottom's first."""
        return tuple(image_size // 2 ** (self.halvings + level) for level in range(self.levels))

    def setup(self):
        same = {
            "channels": self.channels, "residual_channels": self.residual_channels,
            "res_blocks": self.res_blocks, "remat": self.remat, "dtype": self.dtype, "gather": self.gather,
        }  # fmt: skip
        steps = (self.halvings, *(1,) * (self.levels - 1))
        outputs = (self.image_channels, *(self.embed_dim,) * (self.levels - 1))
        levels = range(self.levels)
        self.encoder = [Encoder(self.channels, steps[level], **same) for level in levels]
        self.decoder = [Decoder(outputs[level], steps[level], **same) for level in levels]
        self.quant_conv = [nn.Dense(self.embed_dim, dtype=self.dtype) for _ in range(self.levels)]
        # The vectors of level v double their sides v times before the image's decoder sees them.
        double = lambda: nn.ConvTranspose(self.embed_dim, (4, 4), strides=(2, 2), dtype=self.dtype)
        self.expand = [[double() for _ in range(level)] for level in range(self.levels)]
        shape = (self.codes, self.embed_dim)
        self.codebook = [self.param(f"codebook_{level}", init_codebook, shape) for level in levels]

    def encode(
        self, image: jax.Array, *, temperature: jax.Array | None = None, key: jax.Array | None = None
    ) -> tuple[Level, ...]:
        """The levels of an image, the bottom's first.

        Args:
          image: (B, H, W, 3) in [-1, 1].
          temperature: of the relaxed codes (`quantiser.quantise_softly`); None for the nearest vectors.
          key: random, for relaxed codes.

        Raises:
          ValueError: when the sides are no multiples of `factor`.
        """
        if image.shape[1] % self.factor or image.shape[2] % self.factor:
            sides = f"{image.shape[1]} x {image.shape[2]}"
            raise InputError(f"an image of {sides} has sides that are no multiples of {self.factor}")
        features, h = [], image
        for encoder in self.encoder:
            h = encoder(h)
            features.append(h)
        found: list[Level] = []
        for level in reversed(range(self.levels)):
            h = features[level]
            if found:
                h = jnp.concatenate([self.decoder[level + 1](found[-1].quantised.latents), h], axis=-1)
            z = self.quant_conv[level](h).astype(jnp.float32)
            if temperature is None:
                quantised = quantise(z, self.codebook[level])
            else:
                key, drawn = jax.random.split(key)
                quantised = quantise_softly(z, self.codebook[level], drawn, temperature)
            found.append(Level(z, quantised))
        return tuple(reversed(found))

    def encode_codes(self, image: jax.Array) -> tuple[jax.Array, ...]:
        """Image (B, H, W, 3) in [-1, 1] -> the codes (B, h, w) int32 of each level, the bottom's first."""
        return tuple(level.quantised.codes for level in self.encode(image))

    def lookup(self, codes: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Codes (B, h, w) int32 in [0, K) of each level, the bottom's first -> their vectors (B, h, w, Z)."""
        return tuple(codebook[of_level] for codebook, of_level in zip(self.codebook, codes, strict=True))

    def decode(self, latents: Sequence[jax.Array]) -> jax.Array:
        """Vectors (B, h, w, Z) of each level, the bottom's first -> image (B, H, W, 3), not clipped."""
        joined = []
        for level in reversed(range(self.levels)):
            h = latents[level].astype(self.dtype)
            for expand in self.expand[level]:
                h = expand(h)
            joined.append(h)
        return self.decoder[0](jnp.concatenate(joined, axis=-1)).astype(jnp.float32)

    def decode_codes(self, codes: Sequence[jax.Array]) -> jax.Array:
        """Codes (B, h, w) of each level, the bottom's first -> image (B, H, W, 3)."""
        return self.decode(self.lookup(codes))

    def __call__(self, image: jax.Array) -> tuple[jax.Array, tuple[Level, ...]]:
        """Image (B, H, W, 3) -> its reconstruction through the codebooks, and its levels."""
        levels = self.encode(image)
        return self.decode([level.quantised.latents for level in levels]), levels
