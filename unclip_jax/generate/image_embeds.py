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
from unclip_jax.diffusion.process import add_noise, fold_in, standard_normal
from unclip_jax.diffusion.schedule import schedule_of
from unclip_jax.generate.latents import Inputs
from unclip_jax.generate.networks import Network, part_space
from unclip_jax.generate.options import LatentSamplingOptions
from unclip_jax.models.layers import timestep_embedding

AUGMENTATION = 2  # what the noise on z_i folds into a stage's random key


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


def vector_inputs(
    latent: Network,
    z_image: jax.Array | None,
    rows: int,
    rng: jax.Array | None,
    options: LatentSamplingOptions,
    space: EmbeddingSpace | None = None,
) -> Inputs:
    """What a latent U-Net sees of z_i in both halves of guidance, for `latents.sample_latents`.

    Args:
      latent: the U-Net, with `augmentation`.
      z_image: (B, D) raw image embeddings; None for none: the vector is then zero in both halves.
      rows: B.
      rng: one key, or (B,) keys, one per row; None for no noise, whatever the level.
      options: their `noise_level`.
      space: in place of the part's, while it is being trained.
    """
    zeros = jnp.zeros((1, latent.module.vector_dim))
    if z_image is None:
        return {"vector": (jnp.repeat(zeros, rows, axis=0), zeros)}
    eps = jnp.zeros(z_image.shape)
    if rng is not None:
        eps = standard_normal(fold_in(rng, AUGMENTATION), z_image.shape)
    space = part_space(latent.config) if space is None else space
    level = jnp.full(rows, options.noise_level)
    return {"vector": (noised_vector(latent.config["augmentation"], space, z_image, level, eps), zeros)}
