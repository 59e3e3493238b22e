"""The Gaussian forward process: noising, conversions among x0, eps and v, and the posterior between any two
steps.

With a = sqrt(abar_t) and s = sqrt(1 - abar_t):

    x_t = a x0 + s eps            v = a eps - s x0            (so x0 = a x_t - s v,  eps = s x_t + a v)

For a step from t to an earlier r (abar_r > abar_t), b = 1 - abar_t / abar_r is the variance added between
them. Bayes' rule gives q(x_r | x_t, x0) = N(c0 x0 + ct x_t, b_post) with

    c0 = sqrt(abar_r) b / (1 - abar_t),   ct = sqrt(1 - b) (1 - abar_r) / (1 - abar_t),   b_post = b (1 -
    abar_r) / (1 - abar_t).

All functions take coefficients that broadcast against the arrays. Tables are computed in float64 and cast
once.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.schedule import CLEAN, Schedule
from unclip_jax.errors import InputError

PREDICTIONS = ("eps", "x0", "v")


def expand(coefficient: jax.Array, like: jax.Array) -> jax.Array:
    """(B,) or scalar -> shape that broadcasts against `like` (B, ...)."""
    coefficient = jnp.asarray(coefficient)
    return (
        coefficient.reshape(coefficient.shape + (1,) * (like.ndim - coefficient.ndim))
        if coefficient.ndim
        else coefficient
    )


def standard_normal(rng: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Standard normal noise of `shape` (B, ...).

    Args:
      rng: one key for the whole batch, or (B,) keys, one per row. With keys per row, a row's noise does not
        depend on the batch that it is drawn in.
    """
    if rng.ndim == 0:
        return jax.random.normal(rng, shape, dtype)
    return jax.vmap(lambda key: jax.random.normal(key, shape[1:], dtype))(rng)


def fold_in(rng: jax.Array, data: jax.Array | int) -> jax.Array:
    """`jax.random.fold_in` for one key or for (B,) keys."""
    return (
        jax.random.fold_in(rng, data)
        if rng.ndim == 0
        else jax.vmap(lambda key: jax.random.fold_in(key, data))(rng)
    )


def add_noise(x0: jax.Array, eps: jax.Array, abar: jax.Array) -> jax.Array:
    """x_t of shape (B, ...) from x0, eps (B, ...) and abar () or (B,)."""
    abar = expand(abar, x0)
    return jnp.sqrt(abar) * x0 + jnp.sqrt(1 - abar) * eps


def velocity(x0: jax.Array, eps: jax.Array, abar: jax.Array) -> jax.Array:
    """v = sqrt(abar) eps - sqrt(1 - abar) x0."""
    abar = expand(abar, x0)
    return jnp.sqrt(abar) * eps - jnp.sqrt(1 - abar) * x0


def to_x0_eps(
    prediction: jax.Array, x_t: jax.Array, abar: jax.Array, kind: str
) -> tuple[jax.Array, jax.Array]:
    """Turns a model's output into both x0 and eps.

    Args:
      prediction: (B, ...) the output.
      x_t: (B, ...) the model's input.
      abar: () or (B,), in (0, 1).
      kind: `eps`, `x0` or `v`: what the model predicts.

    Returns:
      x0, eps, consistent with x_t: sqrt(abar) x0 + sqrt(1 - abar) eps = x_t.

    Raises:
      ValueError: on an unknown kind.
    """
    a, s = jnp.sqrt(expand(abar, x_t)), jnp.sqrt(1 - expand(abar, x_t))
    if kind == "eps":
        return (x_t - s * prediction) / a, prediction
    if kind == "x0":
        return prediction, (x_t - a * prediction) / s
    if kind == "v":
        return a * x_t - s * prediction, s * x_t + a * prediction
    raise InputError(f"unknown prediction {kind!r}; choose one of {', '.join(PREDICTIONS)}")


def eps_from_x0(x0: jax.Array, x_t: jax.Array, abar: jax.Array) -> jax.Array:
    """The noise that leads from x0 to x_t."""
    abar = expand(abar, x_t)
    return (x_t - jnp.sqrt(abar) * x0) / jnp.sqrt(1 - abar)


class Posterior(NamedTuple):
    """Coefficients of q(x_r | x_t, x0), float64 arrays of the steps' shape.

    The mean is x0_coef * x0 + x_t_coef * x_t. `log_variance_small` is the posterior's log variance and
    `log_variance_large` that of the forward step. Where r is the clean sample, the posterior variance is
    zero. Its logarithm is then taken from the schedule's second step (Nichol and Dhariwal 2021). Only the
    learned range needs this value, since no noise is added at that step.
    """

    x0_coef: np.ndarray
    x_t_coef: np.ndarray
    variance: np.ndarray
    log_variance_small: np.ndarray
    log_variance_large: np.ndarray


def posterior(schedule: Schedule, t: np.ndarray, r: np.ndarray) -> Posterior:
    """Coefficients for steps t -> r, where -1 <= r < t < T, elementwise.

    Raises:
      ValueError: where r is not before t.
    """
    t, r = np.asarray(t), np.asarray(r)
    if np.any(r >= t):
        raise InputError("a reverse step must lead to an earlier time step")
    abar_t, abar_r = schedule.abar(t), schedule.abar(r)
    beta = 1 - abar_t / abar_r
    variance = beta * (1 - abar_r) / (1 - abar_t)
    # Where the variance is zero, that of the schedule's step 1 -> 0 replaces it.
    first = schedule.abar(np.array([0, 1]))
    floor = (1 - first[1] / first[0]) * (1 - first[0]) / (1 - first[1])
    return Posterior(
        x0_coef=np.sqrt(abar_r) * beta / (1 - abar_t),
        x_t_coef=np.sqrt(1 - beta) * (1 - abar_r) / (1 - abar_t),
        variance=variance,
        log_variance_small=np.log(np.where(r == CLEAN, floor, variance)),
        log_variance_large=np.log(beta),
    )


def learned_log_variance(v_frac: jax.Array, small: jax.Array, large: jax.Array) -> jax.Array:
    """log Sigma = v log beta + (1 - v) log beta~ (Nichol and Dhariwal 2021, eq. 15).

    Args:
      v_frac: (B, ...) the fraction v, nominally in [0, 1]: (output + 1) / 2.
      small, large: log variances of the posterior and of the forward step, () or (B,).
    """
    small, large = expand(small, v_frac), expand(large, v_frac)
    return v_frac * large + (1 - v_frac) * small
