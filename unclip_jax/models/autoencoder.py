"""The autoencoders of latent diffusion (Rombach et al. 2022, section 3.1 and appendix G): images to small
latents and back.

Encoder and decoder are convolutional. A level has residual blocks without a time embedding; between levels
the sides halve or double. The middle has attention of a single head. A 1x1 convolution lies on each side of
the latents (`quant_conv`, `post_quant_conv`); without the second, colours are plausible and wrong.

    KLAutoencoder   the encoder gives a Gaussian, mean and log variance, and the latents are drawn from it
    VQAutoencoder   the latents are replaced by their nearest vectors of a codebook. Diffusion sees them
                    before that: `encode` stops before the codebook, and `decode` goes through it.

The name f8 means that a latent stands for 8 x 8 pixels: four levels. With `spatial_norm` the decoder's norms
are scaled and shifted by the latents (MoVQ, Zheng et al. 2022, section 3.2).

Shape letters: B batch, H W height width, h w latent height and width, C channels, Z latent channels.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.errors import InputError
from unclip_jax.models.layers import Dtype, Gather, attend, with_hooks
from unclip_jax.models.quantiser import Quantised, init_codebook, quantise
from unclip_jax.models.unet import GroupNorm, upsample
from unclip_jax.models.winograd import conv3x3

EPSILON = 1e-6  # of the group normalisation
LOGVAR_RANGE = (-30.0, 20.0)


class Moments(NamedTuple):
    """A diagonal Gaussian over latents: `mean` and `logvar`, (B, h, w, Z) float32; logvar in [-30, 20]."""

    mean: jax.Array
    logvar: jax.Array


def sample_moments(moments: Moments, noise: jax.Array) -> jax.Array:
    """Latents (B, h, w, Z) of the Gaussian, from a standard normal draw of their shape."""
    return moments.mean + jnp.exp(0.5 * moments.logvar) * noise


def kl_divergence(moments: Moments) -> jax.Array:
    """KL(N(mean, var) || N(0, 1)) in nats, summed over each image's latents -> (B,)."""
    mean, logvar = moments
    return 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3))


class Norm(nn.Module):
    """Group normalisation with epsilon 1e-6. With latents it is MoVQ's: norm(x) * conv_y(z) + conv_b(z)."""

    groups: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, z: jax.Array | None = None) -> jax.Array:
        """x (B, H, W, C), z (B, h, w, Z) or None -> (B, H, W, C). z is resized to x, nearest neighbour."""
        h = GroupNorm(self.groups, self.dtype, EPSILON, name="norm")(x)
        if z is None:
            return h
        z = jax.image.resize(z, (*x.shape[:3], z.shape[-1]), "nearest").astype(self.dtype)
        dense = lambda name: nn.Dense(x.shape[-1], dtype=self.dtype, name=name)
        return h * dense("conv_y")(z) + dense("conv_b")(z)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))), with a 1x1 convolution of x where the width changes."""

    channels: int
    groups: int = 32
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    winograd: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, z: jax.Array | None = None, deterministic: bool = True) -> jax.Array:
        """x (B, H, W, C_in), z (B, h, w, Z) for MoVQ's norms -> (B, H, W, channels)."""
        way = conv3x3 if self.winograd else None
        conv = lambda name: nn.Conv(
            self.channels, (3, 3), padding=1, dtype=self.dtype, conv_general_dilated=way, name=name
        )
        h = conv("conv1")(nn.silu(Norm(self.groups, self.dtype, name="norm1")(x, z)))
        h = nn.silu(Norm(self.groups, self.dtype, name="norm2")(h, z))
        h = conv("conv2")(nn.Dropout(self.dropout, deterministic=deterministic)(h))
        if x.shape[-1] != self.channels:
            x = nn.Conv(self.channels, (1, 1), dtype=self.dtype, name="skip")(x)
        return x + h


class Attention(nn.Module):
    """x + self-attention over positions, with a single head as wide as the layer."""

    groups: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, z: jax.Array | None = None) -> jax.Array:
        """x (B, H, W, C), z (B, h, w, Z) for MoVQ's norm -> (B, H, W, C)."""
        b, h, w, c = x.shape
        y = Norm(self.groups, self.dtype, name="norm")(x, z).reshape(b, h * w, c)
        q, k, v = (
            nn.Dense(c, dtype=self.dtype, name=name)(y)[:, :, None] for name in ("query", "key", "value")
        )
        out = attend(q, k, v)[:, :, 0]
        return x + nn.Dense(c, dtype=self.dtype, name="out")(out).reshape(b, h, w, c)


class Downsample(nn.Module):
    """Halves the sides: zeros on the right and at the bottom, then a 3x3 convolution of stride 2."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H // 2, W // 2, C)."""
        padding = ((0, 1), (0, 1))
        return nn.Conv(x.shape[-1], (3, 3), strides=2, padding=padding, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Doubles the sides: nearest neighbour, then a 3x3 convolution."""

    dtype: Dtype = jnp.float32
    winograd: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, 2H, 2W, C)."""
        way = conv3x3 if self.winograd else None
        return nn.Conv(
            x.shape[-1], (3, 3), padding=1, dtype=self.dtype, conv_general_dilated=way, name="conv"
        )(upsample(x))


class Coder(nn.Module):
    """What encoder and decoder share: their blocks, and the two hooks on each of them.

    Attributes: see `KLAutoencoder`. `out_channels` are those of the last convolution.
    """

    out_channels: int
    channels: int
    channel_mult: tuple[int, ...]
    res_blocks: int
    attention_levels: tuple[int, ...] = ()
    middle_attention: bool = True
    groups: int = 32
    dropout: float = 0.0
    remat: str = "none"
    winograd: bool = False
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    def res(self, x, z, name, channels, deterministic):
        """A residual block under the hooks."""
        block = with_hooks(self, ResBlock, self.gather, self.remat, static_argnums=(3,))
        return block(channels, self.groups, self.dropout, self.dtype, self.winograd, name=name)(
            x, z, deterministic
        )

    def attention(self, x, z, name):
        """Attention under the hooks."""
        return with_hooks(self, Attention, self.gather, self.remat)(self.groups, self.dtype, name=name)(x, z)

    def middle(self, h, z, deterministic):
        """Two residual blocks with attention between them."""
        h = self.res(h, z, "middle_res_0", h.shape[-1], deterministic)
        if self.middle_attention:
            h = self.attention(h, z, "middle_attn")
        return self.res(h, z, "middle_res_1", h.shape[-1], deterministic)

    def first(self, x, channels):
        """The first convolution, to `channels`."""
        return nn.Conv(channels, (3, 3), padding=1, dtype=self.dtype, name="conv_in")(x.astype(self.dtype))

    def last(self, h, z):
        """Norm, SiLU and the last convolution."""
        h = nn.silu(Norm(self.groups, self.dtype, name="norm_out")(h, z))
        # The adaptive weight of the adversarial loss is computed from the last layer's input.
        self.sow("intermediates", "features", h)
        return nn.Conv(self.out_channels, (3, 3), padding=1, dtype=self.dtype, name="conv_out")(h)


class Encoder(Coder):
    """Image -> features of the latents' size."""

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """(B, H, W, 3) in [-1, 1] -> (B, h, w, out_channels)."""
        pool = with_hooks(self, Downsample, self.gather, self.remat)
        h = self.first(x, self.channels)
        for level, mult in enumerate(self.channel_mult):
            for i in range(self.res_blocks):
                h = self.res(h, None, f"down_{level}_res_{i}", self.channels * mult, deterministic)
                if level in self.attention_levels:
                    h = self.attention(h, None, f"down_{level}_attn_{i}")
            if level < len(self.channel_mult) - 1:
                h = pool(self.dtype, name=f"down_{level}_pool")(h)
        return self.last(self.middle(h, None, deterministic), None)


class Decoder(Coder):
    """Latents -> image. It has one residual block more per level than the encoder."""

    @nn.compact
    def __call__(self, x: jax.Array, z: jax.Array | None, deterministic: bool = True) -> jax.Array:
        """x (B, h, w, Z) latents, z the latents of MoVQ's norms or None -> (B, H, W, out_channels)."""
        expand = with_hooks(self, Upsample, self.gather, self.remat)
        h = self.middle(self.first(x, self.channels * self.channel_mult[-1]), z, deterministic)
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.res_blocks + 1):
                h = self.res(h, z, f"up_{level}_res_{i}", self.channels * mult, deterministic)
                if level in self.attention_levels:
                    h = self.attention(h, z, f"up_{level}_attn_{i}")
            if level > 0:
                h = expand(self.dtype, self.winograd, name=f"up_{level}_expand")(h)
        return self.last(h, z)


class Autoencoder(nn.Module):
    """The fields and the networks that both autoencoders share.

    Attributes:
      latent_channels: Z.
      channels: base width; level i has channels * channel_mult[i]. Level 0 has the image's sides.
      channel_mult: one factor per level; n levels make latents of 1 / 2^(n-1) of the sides.
      res_blocks: residual blocks per level of the encoder; the decoder has one more.
      attention_levels: levels whose residual blocks are each followed by attention.
      middle_attention: attention between the two middle blocks.
      image_channels: of the image, 3 for RGB.
      groups: groups of the group normalisation; every level's width must be a multiple of it.
      dropout: inside the residual blocks, in [0, 1).
      remat: what each block recomputes in the backward pass (`layers.checkpoint`).
      winograd: the decoder uses convolutions with fewer products (`winograd.conv3x3`), for float32 on CPU.
      gather: hook on each block's parameters.
    """

    latent_channels: int
    channels: int
    channel_mult: tuple[int, ...]
    res_blocks: int
    attention_levels: tuple[int, ...] = ()
    middle_attention: bool = True
    image_channels: int = 3
    groups: int = 32
    dropout: float = 0.0
    remat: str = "none"
    winograd: bool = False
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    MOMENTS = 1  # values that the encoder gives for each latent

    @property
    def factor(self) -> int:
        """Side of the image / side of the latents."""
        return 2 ** (len(self.channel_mult) - 1)

    def setup(self):
        same = {
            "channels": self.channels, "channel_mult": self.channel_mult, "res_blocks": self.res_blocks,
            "attention_levels": self.attention_levels, "middle_attention": self.middle_attention,
            "groups": self.groups, "dropout": self.dropout, "remat": self.remat, "dtype": self.dtype,
            "gather": self.gather,
        }  # fmt: skip
        encoded = self.MOMENTS * self.latent_channels
        self.encoder = Encoder(encoded, **same)
        self.quant_conv = nn.Dense(encoded, dtype=self.dtype)
        self.post_quant_conv = nn.Dense(self.latent_channels, dtype=self.dtype)
        self.decoder = Decoder(self.image_channels, **same, winograd=self.winograd)

    def _encoded(self, image: jax.Array, deterministic: bool) -> jax.Array:
        if min(image.shape[1:3]) < self.factor:
            sides = f"{image.shape[1]} x {image.shape[2]}"
            raise InputError(f"an image of {sides} is smaller than {self.factor}, one latent of this network")
        return self.quant_conv(self.encoder(image, deterministic)).astype(jnp.float32)


class KLAutoencoder(Autoencoder):
    """The autoencoder whose latents are drawn from a Gaussian (LDM's KL; Stable Diffusion's is f8)."""

    MOMENTS = 2

    def encode(self, image: jax.Array, deterministic: bool = True) -> Moments:
        """Image (B, H, W, 3) in [-1, 1] -> the Gaussian over its latents, not scaled."""
        mean, logvar = jnp.split(self._encoded(image, deterministic), 2, axis=-1)
        return Moments(mean, jnp.clip(logvar, *LOGVAR_RANGE))

    def decode(self, z: jax.Array, deterministic: bool = True) -> jax.Array:
        """Latents (B, h, w, Z), not scaled -> image (B, H, W, 3) float32, about [-1, 1], not clipped."""
        h = self.post_quant_conv(z.astype(self.dtype))
        return self.decoder(h, None, deterministic).astype(jnp.float32)

    def __call__(self, image: jax.Array, deterministic: bool = True) -> tuple[jax.Array, Moments]:
        """Image (B, H, W, 3) -> its reconstruction from the mean, and the moments."""
        moments = self.encode(image, deterministic)
        return self.decode(moments.mean, deterministic), moments


class VQAutoencoder(Autoencoder):
    """The autoencoder whose latents are vectors of a codebook (LDM's VQ; VQGAN; MoVQ with `spatial_norm`).

    Attributes:
      codes: number of vectors in the codebook.
      spatial_norm: the decoder's norms are scaled and shifted by the latents (MoVQ).
      unit_range: whether the networks were trained on pixels in [0, 1]. Images here are in [-1, 1] all the
        same.
    """

    codes: int = 8192
    spatial_norm: bool = False
    unit_range: bool = False

    def setup(self):
        super().setup()
        self.codebook = self.param("codebook", init_codebook, (self.codes, self.latent_channels))

    def encode(self, image: jax.Array, deterministic: bool = True) -> jax.Array:
        """Image (B, H, W, 3) in [-1, 1] -> latents (B, h, w, Z) float32, before the codebook."""
        return self._encoded((image + 1.0) / 2.0 if self.unit_range else image, deterministic)

    def quantise(self, z: jax.Array) -> Quantised:
        """Latents (B, h, w, Z) -> their nearest vectors; see `quantiser.quantise`."""
        return quantise(z, self.codebook)

    def lookup(self, codes: jax.Array) -> jax.Array:
        """Codes (B, h, w) int32 in [0, codes) -> their vectors (B, h, w, Z)."""
        return self.codebook[codes]

    def decode_quantised(self, z: jax.Array, deterministic: bool = True) -> jax.Array:
        """Latents (B, h, w, Z), taken as they are -> image (B, H, W, 3) float32, about [-1, 1]."""
        h = self.post_quant_conv(z.astype(self.dtype))
        image = self.decoder(h, z if self.spatial_norm else None, deterministic).astype(jnp.float32)
        return 2.0 * image - 1.0 if self.unit_range else image

    def sides(self, image_size: int) -> tuple[int, ...]:
        """The side of the codes of an image of this side: one level."""
        return (image_size // self.factor,)

    def encode_codes(self, image: jax.Array) -> tuple[jax.Array]:
        """Image (B, H, W, 3) in [-1, 1] -> the codes (B, h, w) int32 of its latents, of one level."""
        return (self.quantise(self.encode(image)).codes,)

    def decode_codes(self, codes: jax.Array) -> jax.Array:
        """Codes (B, h, w) int32 in [0, codes) -> image (B, H, W, 3) float32 in [-1, 1]."""
        return jnp.clip(self.decode_quantised(self.lookup(codes)), -1.0, 1.0)

    def decode(self, z: jax.Array, deterministic: bool = True) -> jax.Array:
        """Latents (B, h, w, Z), which go through the codebook -> image (B, H, W, 3) float32, not clipped."""
        return self.decode_quantised(self.quantise(z).latents, deterministic)

    def __call__(self, image: jax.Array, deterministic: bool = True) -> tuple[jax.Array, Quantised]:
        """Image (B, H, W, 3) -> its reconstruction through the codebook, and the quantised latents."""
        quantised = self.quantise(self.encode(image, deterministic))
        return self.decode_quantised(quantised.latents, deterministic), quantised
