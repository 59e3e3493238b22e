"""GLIDE: the U-Net conditioned on captions alone, through a text encoder of its own (Nichol et al. 2021).

The last state of the text encoder is added to the time embedding. All states are tokens of the U-Net's
attention. The upsampler also sees the enlarged small image, and the networks that inpaint see the known part
of the image. Both join the noised image at the first convolution, and the U-Net itself is unchanged.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.models.layers import Dtype, Gather, computed_once
from unclip_jax.models.text_encoder import TextEncoder
from unclip_jax.models.unet import UNet


class Glide(nn.Module):
    """P(x | y), or P(x | low_res, y) with `upsamples` (Nichol et al. 2021, sections 4 and 4.2).

    Attributes:
      unet: keyword arguments of `UNet`.
      text: keyword arguments of `TextEncoder`.
      upsamples: the network takes a small image, which is enlarged bilinearly.
      inpaint: the network takes the known part of the image, in four more input channels: RGB and mask.
      scan: runs the text encoder's blocks as one loop (`Transformer`).

    The caption is the same at every step of a sampler. The collection `fixed` therefore keeps the output of
    the text encoder, and the keys and values of its states (`layers.computed_once`).
    """

    unet: dict
    text: dict
    upsamples: bool = False
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
        tokens: jax.Array,
        token_mask: jax.Array,
        low_res: jax.Array | None = None,
        known_image: jax.Array | None = None,
        known: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Predicts the noise (and the variance fraction).

        Args:
          x: (B, H, W, 3) noised image.
          t: (B,) time steps in [0, T).
          tokens: (B, L) int32, token_mask: (B, L) bool, True on the caption's own tokens.
          low_res: (B, h, w, 3) in [-1, 1], for a network that upsamples. It is enlarged to H and W.
          known_image: (B, H, W, 3) in [-1, 1], known: (B, H, W, 1) bool, True where the image is known, for a
            network that inpaints. Unknown pixels are ignored.
          deterministic: False switches dropout on.

        Returns:
          (B, H, W, 3 or 6) float32.
        """
        cond, states = computed_once(self, "text", lambda: self._encode(tokens, token_mask, deterministic))
        seen = [x]
        if self.inpaint:
            seen += [jnp.where(known, known_image, 0).astype(x.dtype), known.astype(x.dtype)]
        if self.upsamples:
            shape = (low_res.shape[0], *x.shape[1:3], low_res.shape[-1])
            seen.append(jax.image.resize(low_res, shape, "linear").astype(x.dtype))
        hooks = {"remat": self.remat, "winograd": self.winograd, "gather": self.gather}
        return UNet(**self.unet, dtype=self.dtype, name="unet", **hooks)(
            jnp.concatenate(seen, axis=-1), t, cond=cond, context=states, deterministic=deterministic
        )

    def _encode(
        self, tokens: jax.Array, token_mask: jax.Array, deterministic: bool
    ) -> tuple[jax.Array, jax.Array]:
        # What is added to the time embedding (B, 4 channels), and the tokens of the attention (B, L, W).
        hooks = {"remat": self.remat, "scan": self.scan, "gather": self.gather}
        encoder = TextEncoder(**self.text, dtype=self.dtype, name="text", **hooks)
        states, last = encoder(tokens, token_mask, deterministic)
        return nn.Dense(4 * self.unet["channels"], dtype=self.dtype, name="text_cond")(last), states
