"""A noised image embedding as the condition of a latent U-Net (StableUnCLIP).

The U-Net sees z_i with noise of a level n: z_n = unwhiten(sqrt(abar_n) whiten(z_i) + sqrt(1 - abar_n) eps).
The schedule of abar is that of the part's `augmentation`, and the whitening that of its `embedding_space`.
Beside z_n stands the sinusoid of n, as wide as z_i. Both together are a vector of 2 D, which the U-Net adds
to its time embedding. Training draws n uniformly. In sampling, a higher level leaves more to chance.

In the unconditional half of guidance the whole vector is zero, the sinusoid too, as in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.embedding_space import EmbeddingSpace, denormalize, normalize
from unclip_jax.diffusion.process import add_noise
from unclip_jax.diffusion.schedule import schedule_of
from unclip_jax.errors import InputError
from unclip_jax.models.layers import timestep_embedding


def noise_levels(part_config: Mapping[str, Any]) -> int:
    """The number of noise levels of a latent U-Net that sees z_i; 0 for one that does not."""
    return part_config.get("augmentation", {}).get("num_steps", 0)


def check_noise_level(part_config: Mapping[str, Any], level: int) -> None:
    """Raises ValueError where the U-Net has no such noise level, or sees no z_i."""
    levels = noise_levels(part_config)
    if level and not levels:
        raise InputError(f"noise_level={level} is for networks that see a noised embedding: leave it out")
    if levels and not 0 <= level < levels:
        raise InputError(f"noise_level must be between 0 and {levels - 1}, got {level}")


def noised_vector(
    augmentation: Mapping[str, Any],
    space: EmbeddingSpace,
    z_image: jax.Array,
    level: jax.Array,
    eps: jax.Array,
) -> jax.Array:
    """The vector that a latent U-Net sees of z_i (module docstring).

    Args:
      augmentation: the part's: the noise schedule.
      space: the part's: how z_i is whitened.
      z_image: (B, D) raw image embeddings.
      level: (B,) whole numbers n in [0, T).
      eps: (B, D) standard normal noise.

    Returns:
      (B, 2 D) float32: z_n, then the sinusoid of n.
    """
    abar = jnp.asarray(np.float32(schedule_of(augmentation).alphas_cumprod))[level]
    noised = denormalize(space, add_noise(normalize(space, z_image.astype(jnp.float32)), eps, abar))
    return jnp.concatenate([noised, timestep_embedding(level, z_image.shape[-1])], axis=-1)
