"""Classifier-free guidance (Ho and Salimans 2022) and denoisers.

A denoiser is `denoise(x_t, t) -> Denoised(x0, eps, v_frac)`, where t is a scalar step. It contains the
conditioning and the guidance, so samplers see nothing else of the model. Guidance combines the conditional
and the unconditional prediction in the model's own parameterisation:

    guided = uncond + scale * (cond - uncond)

Scale 1 is the conditional model and scale 0 the unconditional one. The variance always comes from the
conditional half.

The scale may change over time. With u = t / T from 1 (noise) to 0 (clean), it is 1 + (scale - 1) w(u), where
w = 1 (constant), 1 - u (linear) or (1 + cos(pi u)) / 2 (cosine). It may be confined to an interval of u
(Kynkaanniemi et al. 2024). There are two remedies for large scales. Rescaling by phi (Lin et al. 2024,
section 3.4) pulls the standard deviation of the guided prediction back to that of the conditional one:

    guided <- guided (phi std(cond) / std(guided) + 1 - phi)

Dynamic thresholding (Saharia et al. 2022, section 2.3) takes s, a given percentile of a sample's |x0|, but at
least the bound, and at most a second bound where there is one. It clips x0 to [-s, s] and divides it by
s / bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.losses import split_variance
from unclip_jax.diffusion.process import eps_from_x0, expand, to_x0_eps
from unclip_jax.diffusion.schedule import SMALLEST_ABAR, Schedule
from unclip_jax.errors import InputError


class Denoised(NamedTuple):
    """A denoiser's output: arrays of the sample's shape; `v_frac` is None unless the variance is learned.

    score: the gradient of a log-probability of the noised sample, by which ancestral sampling moves the mean
      of each step (`with_score`); None for none.
    """

    x0: jax.Array
    eps: jax.Array
    v_frac: jax.Array | None
    score: jax.Array | None = None


Denoise = Callable[[jax.Array, jax.Array], Denoised]


def guide(cond: jax.Array, uncond: jax.Array, scale: jax.Array | float) -> jax.Array:
    """uncond + scale * (cond - uncond)."""
    return uncond + scale * (cond - uncond)


GUIDANCE_SCHEDULES = {
    "constant": jnp.ones_like,
    "linear": lambda u: 1 - u,
    "cosine": lambda u: 0.5 * (1 + jnp.cos(jnp.pi * u)),
}


class Guidance(NamedTuple):
    """How the two halves are combined (module docstring).

    scale: float, scalar array, or (B,) with one scale per row. schedule: one of `GUIDANCE_SCHEDULES`.
    interval: (low, high) in units of t / T; the scale is 1 outside. rescale: phi in [0, 1].
    """

    scale: float | jax.Array
    schedule: str = "constant"
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0

    def check(self) -> None:
        """Raises ValueError on an unknown schedule, an empty interval or a rescale outside [0, 1]."""
        if self.schedule not in GUIDANCE_SCHEDULES:
            raise InputError(
                f"unknown guidance schedule {self.schedule!r}; choose one of {', '.join(GUIDANCE_SCHEDULES)}"
            )
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise InputError(
                f"the guidance interval must be 0 <= low < high <= 1 in units of t / T, got {low}, {high}"
            )
        if not 0 <= self.rescale <= 1:
            raise InputError(f"guidance rescale must be in [0, 1], got {self.rescale}")

    def at(self, u: jax.Array) -> jax.Array:
        """The scale at u = t / T."""
        scale = 1 + (self.scale - 1) * GUIDANCE_SCHEDULES[self.schedule](u)
        low, high = self.interval
        return jnp.where((u >= low) & (u <= high), scale, 1.0)


def rescaled(guided: jax.Array, cond: jax.Array, phi: float) -> jax.Array:
    """The guided prediction (B, ...), rescaled by phi towards the standard deviation of `cond` per row."""
    axes = tuple(range(1, cond.ndim))
    ratio = jnp.std(cond, axes, keepdims=True) / jnp.maximum(jnp.std(guided, axes, keepdims=True), 1e-8)
    return guided * (phi * ratio + 1 - phi)


def dynamic_threshold(x0: jax.Array, percentile: float, bound: float, most: float | None = None) -> jax.Array:
    """Dynamic thresholding (module docstring): x0 (B, ...) -> (B, ...) in [-bound, bound].

    The percentile (0 to 100) is that of each row's |x0|; it counts up to `most`.
    """
    flat = jnp.abs(x0).reshape(x0.shape[0], -1)
    s = jnp.clip(jnp.percentile(flat, percentile, axis=1), bound, most).reshape((-1,) + (1,) * (x0.ndim - 1))
    return jnp.clip(x0, -s, s) * (bound / s)


def with_score(
    denoise: Denoise, score: Denoise | Callable[..., jax.Array], schedule: Schedule, ancestral: bool
) -> Denoise:
    """Guidance by a classifier (Dhariwal and Nichol 2021, section 4.1 and algorithms 1 and 2).

    Args:
      denoise: the denoiser, with its conditioning.
      score: (x_t, t) -> the gradient of log p(y | x_t) by x_t, times the scale of the guidance, (B, ...).
      schedule: that of the denoiser.
      ancestral: True for ancestral sampling, which adds the score, times the variance of its step, to the
        mean (algorithm 1). Other samplers see it in eps, from which x0 follows (algorithm 2).
    """

    def scored(x_t: jax.Array, t: jax.Array) -> Denoised:
        out, gradient = denoise(x_t, t), score(x_t, t)
        if ancestral:
            return out._replace(score=gradient)
        abar = abar_at(schedule, jnp.asarray(t), x_t.dtype)
        eps = out.eps - jnp.sqrt(1 - abar) * gradient
        return out._replace(x0=to_x0_eps(eps, x_t, abar, "eps")[0], eps=eps)

    return scored


def check_threshold(percentile: float | None, clip: float | None, most: float | None = None) -> None:
    """Raises ValueError on a percentile outside (0, 100], or one without a clip; on a second bound below the
    clip, or without a percentile."""
    if percentile is not None and (clip is None or not 0 < percentile <= 100):
        raise InputError(
            "dynamic thresholding needs a clip and a percentile in (0, 100], "
            f"got clip {clip}, percentile {percentile}"
        )
    if most is not None and (percentile is None or most < clip):
        raise InputError(
            f"threshold_most is for dynamic thresholding, and at least the clip {clip}, got {most}"
        )


def abar_at(
    schedule: Schedule, t: jax.Array, dtype: jnp.dtype = jnp.float32, smallest: float = 0.0
) -> jax.Array:
    """abar at a traced time step t (), at least `smallest`.

    A step that is no whole number lies between two of the schedule's. There sigma = sqrt((1 - abar) / abar)
    is interpolated. In continuous time every step has its own value.
    """
    if schedule.continuous is not None:
        return schedule.traced_abar(t.astype(dtype), jnp)
    table = np.maximum(schedule.alphas_cumprod, smallest)
    if jnp.issubdtype(t.dtype, jnp.integer):
        return jnp.asarray(table, dtype)[t]
    floored = np.maximum(table, SMALLEST_ABAR)
    sigmas = jnp.asarray(np.sqrt((1 - floored) / floored), dtype)
    return 1 / (1 + jnp.square(jnp.interp(t, jnp.arange(schedule.num_steps), sigmas)))


def make_denoiser(
    model: Callable[[jax.Array, jax.Array], jax.Array],
    schedule: Schedule,
    *,
    prediction: str,
    guidance: Guidance | None = None,
    clip: float | None = None,
    threshold: float | None = None,
    threshold_most: float | None = None,
    smallest_abar: float = 0.0,
) -> Denoise:
    """Turns a model into a denoiser.

    Args:
      model: (x (N, ...), t (N,)) -> output (N, ...), with the last axis doubled when the variance is learned.
        Without guidance N = B. With guidance each step calls it once on N = 2B rows: the first half must be
        conditional, the second unconditional.
      schedule: the schedule that the model was trained with.
      prediction: `eps`, `x0` or `v`.
      guidance: None for no guidance (half the work).
      clip: bounds x0 to [-clip, clip] and recomputes eps from it. None changes neither.
      threshold: percentile of dynamic thresholding, which then replaces plain clipping; needs `clip`.
      threshold_most: the second bound of dynamic thresholding; None for none.
      smallest_abar: a lower bound of abar, for samplers that divide by it.

    Returns:
      The denoiser. A step that is no whole number lies between two of the schedule's.

    Raises:
      ValueError: on guidance settings out of range, a percentile outside (0, 100], or one without a clip.
    """
    if guidance is not None:
        guidance.check()
    check_threshold(threshold, clip, threshold_most)
    num_steps = schedule.num_steps

    def denoise(x_t: jax.Array, t: jax.Array) -> Denoised:
        t = jnp.asarray(t)
        abar = abar_at(schedule, t, x_t.dtype, smallest_abar)
        b, channels = x_t.shape[0], x_t.shape[-1]
        if guidance is None:
            out, v_frac = split_variance(model(x_t, jnp.full((b,), t)), channels)
        else:
            halves = model(jnp.concatenate([x_t, x_t]), jnp.full((2 * b,), t))
            halves, v_frac = split_variance(halves, channels)
            cond, uncond = halves[:b], halves[b:]
            out = guide(cond, uncond, expand(guidance.at(t / num_steps), cond))
            if guidance.rescale:
                out = rescaled(out, cond, guidance.rescale)
            v_frac = None if v_frac is None else v_frac[:b]
        x0, eps = to_x0_eps(out, x_t, abar, prediction)
        if clip is not None:
            if threshold is None:
                x0 = jnp.clip(x0, -clip, clip)
            else:
                x0 = dynamic_threshold(x0, threshold, clip, threshold_most)
            eps = eps_from_x0(x0, x_t, abar)
        return Denoised(x0, eps, v_frac)

    return denoise
