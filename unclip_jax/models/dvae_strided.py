"""The discrete VAE of DALLE-pytorch: images to a grid of codes by strided convolutions, and back.

It does what `models.dvae` does, with another network:

    encoder   convolutions 4x4 of stride 2, each with a ReLU; residual blocks; a 1x1 convolution to K logits
    decoder   the vectors of the codes; where there are residual blocks, a 1x1 convolution and the blocks;
              transposed convolutions 4x4 of stride 2, each with a ReLU; a 1x1 convolution to the image
    block     x + conv1x1(relu(conv3x3(relu(conv3x3(x)))))

Shape letters: B batch, H W height width of the image, h w those of the codes, K codes, Z width of a vector.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.errors import InputError
from unclip_jax.models.layers import Dtype, Gather, with_hooks


class Block(nn.Module):
    """The residual block."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, h, w, C) -> (B, h, w, C)."""
        width, h = x.shape[-1], x
        for i, side in enumerate((3, 3, 1), 1):
            h = nn.relu(h) if i > 1 else h
            h = nn.Conv(width, (side, side), padding=side // 2, dtype=self.dtype, name=f"conv{i}")(h)
        return x + h


class Coder(nn.Module):
    """What encoder and decoder share: their residual blocks, under the two hooks."""

    out_channels: int
    channels: int
    levels: int
    code_blocks: int
    remat: str = "none"
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    def blocks(self, h: jax.Array) -> jax.Array:
        """The residual blocks."""
        block = with_hooks(self, Block, self.gather, self.remat)
        for i in range(self.code_blocks):
            h = block(self.dtype, name=f"block_{i}")(h)
        return h

    def last(self, h: jax.Array) -> jax.Array:
        """The last convolution, float32."""
        return nn.Conv(self.out_channels, (1, 1), name="conv_out")(h.astype(jnp.float32))


class Encoder(Coder):
    """Image -> logits of the codes."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, 3) -> (B, h, w, K) float32."""
        h = x.astype(self.dtype)
        for i in range(self.levels):
            conv = nn.Conv(self.channels, (4, 4), strides=2, padding=1, dtype=self.dtype, name=f"pool_{i}")
            h = nn.relu(conv(h))
        return self.last(self.blocks(h))


class Decoder(Coder):
    """Vectors of codes -> image."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, h, w, Z) -> (B, H, W, 3) float32."""
        h = x.astype(self.dtype)
        if self.code_blocks:
            h = self.blocks(nn.Conv(self.channels, (1, 1), dtype=self.dtype, name="conv_in")(h))
        for i in range(self.levels):
            conv = nn.ConvTranspose(
                self.channels, (4, 4), strides=(2, 2), dtype=self.dtype, name=f"expand_{i}"
            )
            h = nn.relu(conv(h))
        return self.last(h)


class StridedDVAE(nn.Module):
    """The discrete VAE.

    Attributes:
      channels: of all layers (64).
      levels: each halves the sides (3).
      code_blocks: residual blocks of the encoder, and of the decoder (0).
      codes: K (512).
      embed_dim: Z (512).
      image_channels: 3 for RGB.
      unit_range: whether the network was trained on pixels in [0, 1], and not in [-1, 1]. Images here are in
        [-1, 1] all the same.
      remat: what each block recomputes in the backward pass (`layers.checkpoint`).
      gather: hook on each block's parameters.
    """

    channels: int = 64
    levels: int = 3
    code_blocks: int = 0
    codes: int = 512
    embed_dim: int = 512
    image_channels: int = 3
    unit_range: bool = False
    remat: str = "none"
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    @property
    def factor(self) -> int:
        """Side of the image / side of the codes."""
        return 2**self.levels

    def setup(self):
        same = {
            "channels": self.channels, "levels": self.levels, "code_blocks": self.code_blocks,
            "remat": self.remat, "dtype": self.dtype, "gather": self.gather,
        }  # fmt: skip
        self.encoder = Encoder(self.codes, **same)
        self.decoder = Decoder(self.image_channels, **same)
        self.codebook = self.param("codebook", nn.initializers.normal(1.0), (self.codes, self.embed_dim))

    def encode(self, image: jax.Array) -> jax.Array:
        """Image (B, H, W, 3) in [-1, 1] -> logits (B, h, w, K) float32.

        Raises:
          ValueError: when the sides are no multiples of `factor`.
        """
        if image.shape[1] % self.factor or image.shape[2] % self.factor:
            sides = f"{image.shape[1]} x {image.shape[2]}"
            raise InputError(f"an image of {sides} has sides that are no multiples of {self.factor}")
        return self.encoder((image + 1.0) / 2.0 if self.unit_range else image)

    def sides(self, image_size: int) -> tuple[int, ...]:
        """The side of the codes of an image of this side: one level."""
        return (image_size // self.factor,)

    def encode_codes(self, image: jax.Array) -> tuple[jax.Array]:
        """Image (B, H, W, 3) in [-1, 1] -> its most probable codes (B, h, w) int32, of one level."""
        return (jnp.argmax(self.encode(image), axis=-1).astype(jnp.int32),)

    def decode_codes(self, codes: jax.Array) -> jax.Array:
        """Codes (B, h, w) int32 in [0, K) -> image (B, H, W, 3) in [-1, 1]."""
        image = self.decoder(self.codebook[codes])
        return jnp.clip(2.0 * image - 1.0 if self.unit_range else image, -1.0, 1.0)

    def __call__(self, image: jax.Array) -> jax.Array:
        """Image (B, H, W, 3) in [-1, 1] -> its reconstruction from the most probable codes."""
        return self.decode_codes(self.encode_codes(image)[0])
