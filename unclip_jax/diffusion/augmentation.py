"""Noise conditioning augmentation (Ho et al. 2021; Saharia et al. 2022, section 2.4).

An upsampler learns on small images with noise of a random level s, which it is told. In sampling the level is
chosen: more of it hides the faults of the small image, and leaves the network freer. The noise is that of a
linear schedule in continuous time,

    x_s = sqrt(abar) x + sqrt(1 - abar) eps,    abar(s) = exp(-(1e-4 + 10 s^2)),    s in [0, 1]

The paper does not say its schedule; this one is that of Song et al. (2021) and of public code.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unclip_jax.diffusion.process import add_noise


def augmented(x: jax.Array, level: jax.Array, eps: jax.Array) -> jax.Array:
    """x and eps (B, ...), level (B,) in [0, 1] -> x with noise of this level, (B, ...)."""
    return add_noise(x, eps, jnp.exp(-(1e-4 + 10 * jnp.square(level))))
