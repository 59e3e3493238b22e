"""The decoder: the U-Net conditioned on CLIP's image embedding and on the caption (unCLIP section 2.1)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.models.layers import Dtype, Gather, LayerNorm, computed_once
from unclip_jax.models.text_encoder import TextEncoder
from unclip_jax.models.unet import UNet


class ClipConditioning(nn.Module):
    """Turns CLIP's outputs into a vector for the time embedding and tokens for attention (unCLIP section
    2.1).

    One projection of z_i is added to the time embedding. Another makes `clip_tokens` extra tokens, which
    precede the text states. With `use_text_embed`, a projection of z_t is added to the time embedding too
    (Karlo). A learned null embedding replaces a dropped z_i. The token projection has the layout (B, Dc,
    tokens) and is then transposed, as in the public weights.
    """

    cond_dim: int
    context_dim: int
    clip_tokens: int = 4
    use_text_embed: bool = True
    use_text_states: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        image_embed: jax.Array,
        drop_image: jax.Array,
        text_embed: jax.Array | None,
        text_states: jax.Array | None,
        text_mask: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """image_embed (B, D), drop_image (B,) bool, text_embed (B, D), text_states (B, L, W), text_mask (B,
        L) bool -> cond (B, cond_dim), context (B, N, context_dim), context_mask (B, N) bool.
        """
        b, d = image_embed.shape
        null = self.param("null_image_embed", nn.initializers.zeros_init(), (d,))
        z = jnp.where(drop_image[:, None], null, image_embed).astype(self.dtype)
        cond = nn.Dense(self.cond_dim, dtype=self.dtype, name="image_embed_cond")(z)
        tokens = nn.Dense(self.clip_tokens * self.context_dim, dtype=self.dtype, name="image_embed_tokens")(z)
        context = tokens.reshape(b, self.context_dim, self.clip_tokens).transpose(0, 2, 1)
        mask = jnp.ones((b, self.clip_tokens), bool)
        if self.use_text_embed:
            cond = cond + nn.Dense(self.cond_dim, dtype=self.dtype, name="text_embed_cond")(
                text_embed.astype(self.dtype)
            )
        if self.use_text_states:
            text = nn.Dense(self.context_dim, dtype=self.dtype, name="text_states_in")(
                text_states.astype(self.dtype)
            )
            text = LayerNorm(dtype=self.dtype, name="text_states_norm")(text)
            context = jnp.concatenate([context, text], axis=1)
            mask = jnp.concatenate([mask, text_mask.astype(bool)], axis=1)
        return cond, context, mask


class Decoder(nn.Module):
    """P(x | z_i, y): the U-Net conditioned on CLIP (unCLIP section 2.1).

    Attributes:
      unet: keyword arguments of `UNet`.
      conditioning: keyword arguments of `ClipConditioning` except cond_dim (context_dim, clip_tokens, ...).
      text: keyword arguments of the decoder's own `TextEncoder` (the paper), of width context_dim. None for
        CLIP's states (Karlo), or no text states.
      inpaint: the decoder also sees the known part of the image, in four more input channels: RGB and mask
        (GLIDE, on inpainting).
      scan: runs the text encoder's blocks as one loop (`Transformer`).

    The image and the caption are the same at every step of a sampler. The collection `fixed` therefore keeps
    the conditioning, and the keys and values of its tokens in every attention layer (`layers.computed_once`).
    """

    unet: dict
    conditioning: dict
    text: dict | None = None
    inpaint: bool = False
    remat: str = "none"
    winograd: bool = False
    scan: bool = False
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        *,
        image_embed: jax.Array,
        drop_image: jax.Array,
        text_embed: jax.Array | None = None,
        text_states: jax.Array | None = None,
        text_mask: jax.Array | None = None,
        tokens: jax.Array | None = None,
        token_mask: jax.Array | None = None,
        known_image: jax.Array | None = None,
        known: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Predicts the noise (and the variance fraction).

        Args:
          x: (B, H, W, 3) noised image.
          t: (B,) time steps in [0, T).
          image_embed: (B, D) raw CLIP image embedding.
          drop_image: (B,) bool, True where the learned null embedding replaces the image embedding.
          text_embed: (B, D) raw CLIP text embedding, when the conditioning uses it.
          text_states: (B, L, W), text_mask: (B, L) bool, when the conditioning uses them.
          tokens: (B, L) int32, token_mask: (B, L) bool, when the decoder has its own text encoder.
          known_image: (B, H, W, 3) in [-1, 1], known: (B, H, W, 1) bool, True where the image is known, when
            the decoder inpaints. Unknown pixels are ignored.
          deterministic: False switches dropout on.

        Returns:
          (B, H, W, 3 or 6) float32.
        """
        cond, context, mask = computed_once(
            self,
            "conditioning",
            lambda: self._condition(
                image_embed, drop_image, text_embed, text_states, text_mask, tokens, token_mask, deterministic
            ),
        )
        if self.inpaint:
            x = jnp.concatenate([x, jnp.where(known, known_image, 0), known.astype(x.dtype)], axis=-1)
        hooks = {"remat": self.remat, "winograd": self.winograd, "gather": self.gather}
        return UNet(**self.unet, dtype=self.dtype, name="unet", **hooks)(
            x, t, cond=cond, context=context, context_mask=mask, deterministic=deterministic
        )

    def _condition(
        self,
        image_embed: jax.Array,
        drop_image: jax.Array,
        text_embed: jax.Array | None,
        text_states: jax.Array | None,
        text_mask: jax.Array | None,
        tokens: jax.Array | None,
        token_mask: jax.Array | None,
        deterministic: bool,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        # The U-Net's conditioning on image and caption: cond (B, 4 channels), context (B, N, Dc), its mask
        # (B, N).
        cond_dim = 4 * self.unet["channels"]
        cond, context, mask = ClipConditioning(
            cond_dim=cond_dim, dtype=self.dtype, name="conditioning", **self.conditioning
        )(image_embed, drop_image, text_embed, text_states, text_mask)
        if self.text is not None:
            encoder = TextEncoder(
                **self.text,
                remat=self.remat,
                scan=self.scan,
                dtype=self.dtype,
                gather=self.gather,
                name="text",
            )
            states, last = encoder(tokens, token_mask, deterministic)
            cond = cond + nn.Dense(cond_dim, dtype=self.dtype, name="text_cond")(last)
            context = jnp.concatenate([context, states], axis=1)
            mask = jnp.ones(context.shape[:2], bool)
        return cond, context, mask
