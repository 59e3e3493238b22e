"""The upsampler: the U-Net on a noised image and an enlarged low-resolution image (unCLIP section 2.1)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.models.layers import Dtype, Gather
from unclip_jax.models.unet import UNet


class Upsampler(nn.Module):
    """P(x | low_res): the U-Net on the noised image, concatenated with the enlarged low-resolution image.

    See unCLIP section 2.1.

    Attributes:
      unet: keyword arguments of `UNet`; the papers' upsamplers have no attention.
      resize: `cubic` (Karlo) or `linear` (GLIDE), how the low-resolution image is enlarged.
    """

    unet: dict
    resize: str = "cubic"
    remat: str = "none"
    winograd: bool = False
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    def enlarge(self, low_res: jax.Array, size: tuple[int, int]) -> jax.Array:
        """(B, h, w, 3) -> (B, *size, 3), the U-Net's input. An image of that size is returned unchanged."""
        return jax.image.resize(low_res, (low_res.shape[0], *size, low_res.shape[-1]), self.resize)

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, *, low_res: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """x (B, H, W, 3) noised, t (B,), low_res (B, h, w, 3) in [-1, 1] -> (B, H, W, 3 or 6) float32."""
        enlarged = self.enlarge(low_res, x.shape[1:3])
        hooks = {"remat": self.remat, "winograd": self.winograd, "gather": self.gather}
        return UNet(**self.unet, dtype=self.dtype, name="unet", **hooks)(
            jnp.concatenate([x, enlarged.astype(x.dtype)], axis=-1), t, deterministic=deterministic
        )
