"""LPIPS, a perceptual distance of images (Zhang et al. 2018): VGG16's features, compared.

The features after each of the five stages are normalised to unit length at every position. Their squared
difference, weighted per channel by a learned head, is averaged over the positions, and the five are added up.
It is version 0.1 with the heads ("lin"). Dropout before the heads is of their training only.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.errors import InputError
from unclip_jax.models.layers import Dtype

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
SMALLEST = 16  # side of an image that the fifth stage still sees


class LPIPS(nn.Module):
    """The distance of two images.

    Attributes:
      widths: channels of VGG's stages.
      convolutions: 3x3 convolutions in each stage.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    convolutions: tuple[int, ...] = (2, 2, 3, 3, 3)
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Images (B, H, W, 3) in [-1, 1], of the same sides -> distances (B,) float32, not negative.

        Raises:
          ValueError: when a side is too small for VGG's four poolings.
        """
        if min(a.shape[1:3]) < SMALLEST:
            raise InputError(
                f"LPIPS needs images of at least {SMALLEST} pixels, got {a.shape[1]} x {a.shape[2]}"
            )
        batch, total = a.shape[0], jnp.zeros(a.shape[0], jnp.float32)
        h = (jnp.concatenate([a, b]).astype(jnp.float32) - jnp.array(SHIFT)) / jnp.array(SCALE)
        h = h.astype(self.dtype)
        for stage, (width, count) in enumerate(zip(self.widths, self.convolutions, strict=True)):
            if stage:
                h = nn.max_pool(h, (2, 2), strides=(2, 2))
            for i in range(count):
                conv = nn.Conv(width, (3, 3), padding=1, dtype=self.dtype, name=f"conv_{stage}_{i}")
                h = nn.relu(conv(h))
            unit = _unit(h.astype(jnp.float32))
            head = self.param(f"lin_{stage}", nn.initializers.constant(1.0 / width), (width,))
            squared = jnp.square(unit[:batch] - unit[batch:])
            total = total + jnp.mean(jnp.einsum("bhwc,c->bhw", squared, head), axis=(1, 2))
        return total


def _unit(x: jax.Array) -> jax.Array:
    # Vectors (..., C) of length 1; zeros stay, with a gradient of zero where the root's would be infinite.
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    positive = squared > 0
    norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)
    return x / (norm + 1e-10)
