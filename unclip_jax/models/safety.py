"""The safety checker of Stable Diffusion: CLIP's image tower, and concepts that pictures must not be near to.

A picture's embedding has a cosine with each concept, and each concept a threshold of its own. A picture is
flagged when one of the cosines exceeds its threshold by more than half of 0.001. Where it is near one of the
special concepts in the same sense, the other thresholds are lower by 0.01.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.models.clip import ImageTower, unit
from unclip_jax.models.layers import Dtype, Gather

LOWER = 0.01  # thresholds are so much lower near a special concept


class SafetyChecker(nn.Module):
    """Flags pictures.

    Attributes:
      embed_dim: D, the embeddings' size.
      image: keyword arguments of `ImageTower`.
      activation: of the tower.
      concepts, special: how many concepts there are.
    """

    embed_dim: int
    image: dict
    activation: str = "quick_gelu"
    concepts: int = 17
    special: int = 3
    remat: str = "none"
    scan: bool = False
    dtype: Dtype = jnp.float32
    gather: Gather | None = None

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """(B, H, W, 3) in [-1, 1], of the tower's size -> (B,) bool, True where a picture is flagged."""
        hooks = {"remat": self.remat, "scan": self.scan, "dtype": self.dtype, "gather": self.gather}
        tower = ImageTower(
            self.embed_dim, activation=self.activation, **self.image, **hooks, name="image_tower"
        )
        z = unit(tower(image))

        def over(name: str, count: int) -> jax.Array:
            # How far each cosine is over its threshold: (B, count).
            table = self.param(name, nn.initializers.ones_init(), (count, self.embed_dim))
            threshold = self.param(f"{name}_threshold", nn.initializers.ones_init(), (count,))
            return z @ unit(table.astype(jnp.float32)).T - threshold

        rounded = lambda score: jnp.round(1000 * score) / 1000
        near = jnp.any(rounded(over("special", self.special)) > 0, axis=1)
        scores = over("concept", self.concepts) + LOWER * near[:, None]
        return jnp.any(rounded(scores) > 0, axis=1)
