"""Classifier-free guidance (Ho and Salimans 2022) and the making of denoisers.

A denoiser is `denoise(x_t, t) -> Denoised(x0, eps, v_frac)`: t is a scalar step, conditioning and guidance are inside. Samplers see
nothing else. Guidance combines the conditional and the unconditional prediction, in the model's own parameterisation:

    guided = uncond + scale * (cond - uncond)

so that scale 1 is the conditional model and scale 0 the unconditional one. The variance always comes from the conditional half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.losses import split_variance
from unclip_jax.diffusion.process import eps_from_x0, to_x0_eps
from unclip_jax.diffusion.schedule import Schedule


class Denoised(NamedTuple):
    """A denoiser's answer, arrays of the sample's shape; `v_frac` is None unless the variance is learned."""

    x0: jax.Array
    eps: jax.Array
    v_frac: jax.Array | None


Denoise = Callable[[jax.Array, jax.Array], Denoised]


def guide(cond: jax.Array, uncond: jax.Array, scale: jax.Array | float) -> jax.Array:
    """uncond + scale * (cond - uncond)."""
    return uncond + scale * (cond - uncond)


def make_denoiser(
    model: Callable[[jax.Array, jax.Array], jax.Array],
    schedule: Schedule,
    *,
    prediction: str,
    guidance_scale: float | jax.Array | None = None,
    clip: float | None = None,
) -> Denoise:
    """Makes a denoiser of a model.

    Args:
      model: (x (N, ...), t (N,)) -> output (N, ...), with the last axis doubled when the variance is learned. Without guidance N = B.
        With guidance it is called once on N = 2B rows: the first half must be conditional, the second unconditional.
      schedule: the schedule it was trained with.
      prediction: `eps`, `x0` or `v`.
      guidance_scale: None for no guidance (half the work), else the scale.
      clip: bounds x0 to [-clip, clip] and recomputes eps from it; None leaves both alone.

    Returns:
      The denoiser.
    """
    table = np.asarray(schedule.alphas_cumprod)

    def denoise(x_t: jax.Array, t: jax.Array) -> Denoised:
        abar = jnp.asarray(table, x_t.dtype)[t]
        b, channels = x_t.shape[0], x_t.shape[-1]
        if guidance_scale is None:
            out, v_frac = split_variance(model(x_t, jnp.full((b,), t)), channels)
        else:
            both = model(jnp.concatenate([x_t, x_t]), jnp.full((2 * b,), t))
            out, v_frac = split_variance(both, channels)
            out = guide(out[:b], out[b:], guidance_scale)
            v_frac = None if v_frac is None else v_frac[:b]
        x0, eps = to_x0_eps(out, x_t, abar, prediction)
        if clip is not None:
            x0 = jnp.clip(x0, -clip, clip)
            eps = eps_from_x0(x0, x_t, abar)
        return Denoised(x0, eps, v_frac)

    return denoise
