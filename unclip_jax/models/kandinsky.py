"""Kandinsky 2.2's decoder: the ADM U-Net on the latents of an autoencoder, conditioned on z_i alone.

It is the decoder of unCLIP moved into latent space (Razzhigaev et al. 2023, section 3): no text reaches it.
The U-Net is that of `unet` unchanged. A small module in front of it makes a vector for the time embedding and
tokens for the attention of z_i. There is no learned null embedding: for guidance, the embedding of an image
without content stands in for z_i (`generate.kandinsky`).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.errors import InputError
from unclip_jax.models.layers import Dtype, Gather, LayerNorm, computed_once
from unclip_jax.models.unet import UNet


class ImageConditioning(nn.Module):
    """Turns z_i into a vector for the time embedding and `tokens` tokens for the attention.

    Both are projections with a layer normalisation behind them.
    """

    cond_dim: int
    context_dim: int
    tokens: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, image_embed: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, D) -> cond (B, cond_dim), context (B, tokens, context_dim)."""
        z = image_embed.astype(self.dtype)
        dense = lambda features, name: nn.Dense(features, dtype=self.dtype, name=name)(z)
        norm = lambda name: LayerNorm(dtype=self.dtype, name=name)
        cond = norm("cond_norm")(dense(self.cond_dim, "cond"))
        context = dense(self.tokens * self.context_dim, "tokens")
        return cond, norm("tokens_norm")(context.reshape(len(z), self.tokens, self.context_dim))


class KandinskyDecoder(nn.Module):
    """P(latents | z_i).

    Attributes:
      unet: keyword arguments of `UNet`; `image_size` is the side of the latents in training. With 2 Z output
        channels the variance is learned.
      embed_dim: D, the size of CLIP's embeddings.
      latent_channels: Z, of the autoencoder.
      context_dim: width of the tokens made of z_i.
      clip_tokens: their number.
      inpaint: the decoder also sees the latents of the known part of the image, and where it is known, in
        Z + 1 more input channels.

    The image is the same at every step of a sampler. The collection `fixed` therefore keeps the conditioning,
    and the keys and values of its tokens in every attention layer (`layers.computed_once`).
    """

    unet: dict
    embed_dim: int
    latent_channels: int
    context_dim: int
    clip_tokens: int = 32
    inpaint: bool = False
    remat: str = "none"
    winograd: bool = False
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    @property
    def image_size(self) -> int:
        """The side of the latents in training."""
        return self.unet["image_size"]

    @property
    def in_channels(self) -> int:
        """Channels of the input: the latents', and those concatenated to them."""
        return 2 * self.latent_channels + 1 if self.inpaint else self.latent_channels

    @property
    def out_channels(self) -> int:
        """Channels of what it draws, Z; a learned variance is not counted."""
        return self.latent_channels

    @property
    def multiple(self) -> int:
        """The sides of the latents must be multiples of this number."""
        return 2 ** (len(self.unet["channel_mult"]) - 1)

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, *, image_embed: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Predicts the noise (and the variance fraction).

        Args:
          x: (B, H, W, in_channels) noised latents; to inpaint, with the known latents and the mask behind
            them.
          t: (B,) time steps in [0, T).
          image_embed: (B, D) raw CLIP image embeddings.
          deterministic: False switches dropout on (needs the `dropout` RNG).

        Returns:
          (B, H, W, Z or 2 Z) float32.

        Raises:
          ValueError: when an input has another size than the network's.
        """
        for what, given, wanted in (
            ("latents with channels", x.shape[-1], self.in_channels),
            ("embeddings", image_embed.shape[-1], self.embed_dim),
        ):
            if given != wanted:
                raise InputError(f"this decoder takes {what} of {wanted}, got {given}")
        settings = (4 * self.unet["channels"], self.context_dim, self.clip_tokens, self.dtype)
        cond, context = computed_once(
            self, "conditioning", lambda: ImageConditioning(*settings, name="image")(image_embed)
        )
        hooks = {"remat": self.remat, "winograd": self.winograd, "gather": self.gather}
        unet = UNet(**self.unet, dtype=self.dtype, name="unet", **hooks)
        return unet(x, t, cond=cond, context=context, deterministic=deterministic)
