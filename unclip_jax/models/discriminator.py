"""The patch discriminator of VQGAN and latent diffusion (Isola et al. 2017, section 3.2.2).

Every output judges one patch of the image: 70 x 70 pixels with three layers. Batch normalisation takes its
statistics over the global batch. Real and reconstructed images come in separate calls, and each call is
normalised by its own statistics.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.models.layers import Dtype

NORMAL = nn.initializers.normal(0.02)


def _about_one(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    return 1.0 + NORMAL(key, shape, dtype)


class PatchDiscriminator(nn.Module):
    """4x4 convolutions with LeakyReLU 0.2: `layers` of them halve the sides, and two more keep them.

    Attributes:
      channels: of the first layer; each layer has twice as many as the one before, at most 8 times.
      layers: layers that halve the sides.
    """

    channels: int = 64
    layers: int = 3
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = True) -> jax.Array:
        """Image (B, H, W, 3) in [-1, 1] -> logits (B, h, w) float32, large where a patch looks real.

        The collection `batch_stats` holds the running statistics, which `train=False` uses. Sides of 256 give
        30 x 30 logits with three layers.
        """

        def conv(x, channels, strides, name, bias=False):
            return nn.Conv(
                channels, (4, 4), strides=strides, padding=1, use_bias=bias, dtype=self.dtype,
                kernel_init=NORMAL, name=name,
            )(x)  # fmt: skip

        h = nn.leaky_relu(conv(image.astype(self.dtype), self.channels, 2, "conv_0", bias=True), 0.2)
        for i in range(1, self.layers + 1):
            channels = self.channels * min(2**i, 8)
            h = conv(h, channels, 2 if i < self.layers else 1, f"conv_{i}")
            norm = nn.BatchNorm(
                use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype,
                scale_init=_about_one, use_fast_variance=False, name=f"norm_{i}",
            )  # fmt: skip
            h = nn.leaky_relu(norm(h), 0.2)
        return conv(h, 1, 1, f"conv_{self.layers + 1}", bias=True)[..., 0].astype(jnp.float32)

    def smallest(self) -> int:
        """The smallest side of an image that gives a logit."""
        side = 1
        for stride in (1, 1, *[2] * self.layers):
            side = (side - 1) * stride + 2
        return side
