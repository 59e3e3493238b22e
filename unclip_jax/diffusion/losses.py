"""Diffusion training losses (Ho et al. 2020; Nichol and Dhariwal 2021), one value per example, all in
float32.

simple   mean over the sample of |prediction - target|^2
hybrid   simple + weight * T * L_vb, where L_vb (in bits per dimension) is
         KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), or at t = 0 the negative log-likelihood of the
         discretised image. No gradient flows through the mean inside L_vb, so that only the variance learns
         from it.

The paper's weight is 0.001 with L_vb summed over the T steps. Training draws one step, so T * L_vb estimates
that sum, and the factor of L_vb is T / 1000 at weight 0.001.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.process import add_noise, learned_log_variance, posterior, to_x0_eps, velocity
from unclip_jax.diffusion.schedule import Schedule
from unclip_jax.errors import InputError


class DiffusionTables(NamedTuple):
    """A schedule's tables for training: (T,) float32 each, indexed by t, cast once from float64."""

    alphas_cumprod: jax.Array
    x0_coef: jax.Array
    x_t_coef: jax.Array
    log_variance_small: jax.Array
    log_variance_large: jax.Array

    def draw(self, rng: jax.Array, count: int) -> jax.Array:
        """Steps t (count,) int32, drawn uniformly."""
        return jax.random.randint(rng, (count,), 0, self.alphas_cumprod.shape[0])

    def abar(self, t: jax.Array) -> jax.Array:
        """abar at steps t (B,): (B,) float32."""
        return jnp.asarray(self.alphas_cumprod)[t]


class ContinuousTime(NamedTuple):
    """What stands for the tables in continuous time. It has no variance that could be learned."""

    schedule: Schedule

    def draw(self, rng: jax.Array, count: int) -> jax.Array:
        """Steps t = T u - 1 (count,) float32, with u drawn uniformly from [0, 1)."""
        return self.schedule.num_steps * jax.random.uniform(rng, (count,)) - 1

    def abar(self, t: jax.Array) -> jax.Array:
        """abar at steps t (B,): (B,) float32."""
        return self.schedule.traced_abar(t, jnp)


Times = DiffusionTables | ContinuousTime


def training_times(schedule: Schedule) -> Times:
    """What a loss without learned variance needs of a schedule of either kind."""
    return training_tables(schedule) if schedule.continuous is None else ContinuousTime(schedule)


def training_tables(schedule: Schedule) -> DiffusionTables:
    """Tables for single steps t -> t - 1."""
    t = np.arange(schedule.num_steps)
    post = posterior(schedule, t, t - 1)
    tables = (
        schedule.alphas_cumprod,
        post.x0_coef,
        post.x_t_coef,
        post.log_variance_small,
        post.log_variance_large,
    )
    return DiffusionTables(*(np.asarray(a, np.float32) for a in tables))


def mean_per_example(x: jax.Array) -> jax.Array:
    """(B, ...) -> (B,) mean in float32."""
    return jnp.mean(x.astype(jnp.float32).reshape(x.shape[0], -1), axis=-1)


def sample_noised(rng: jax.Array, x0: jax.Array, tables: Times) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws t (B,) uniformly and eps like x0 (B, ...); returns t, eps and x_t."""
    rng_t, rng_eps = jax.random.split(rng)
    t = tables.draw(rng_t, x0.shape[0])
    eps = jax.random.normal(rng_eps, x0.shape, jnp.float32)
    return t, eps, add_noise(x0, eps, tables.abar(t))


def target_of(x0: jax.Array, eps: jax.Array, t: jax.Array, tables: Times, kind: str) -> jax.Array:
    """The target of a prediction of a kind (`eps`, `x0` or `v`): x0 and eps (B, ...), t (B,) -> (B, ...).

    Raises:
      ValueError: on an unknown kind.
    """
    targets = {"eps": eps, "x0": x0, "v": velocity(x0, eps, tables.abar(t))}
    if kind not in targets:
        raise InputError(f"unknown prediction {kind!r}; choose one of {', '.join(targets)}")
    return targets[kind]


def simple_loss(
    prediction: jax.Array, x0: jax.Array, eps: jax.Array, t: jax.Array, tables: Times, kind: str
) -> jax.Array:
    """Mean squared error of the prediction (B, ...) against its target (`target_of`): (B,) float32."""
    return mean_per_example(jnp.square(prediction - target_of(x0, eps, t, tables, kind)))


def normal_kl(mean1: jax.Array, log_var1: jax.Array, mean2: jax.Array, log_var2: jax.Array) -> jax.Array:
    """KL(N(mean1, e^log_var1) || N(mean2, e^log_var2)), elementwise, nats."""
    return 0.5 * (
        log_var2
        - log_var1
        - 1
        + jnp.exp(log_var1 - log_var2)
        + jnp.square(mean1 - mean2) * jnp.exp(-log_var2)
    )


def discretised_nll(x: jax.Array, mean: jax.Array, log_var: jax.Array) -> jax.Array:
    """Negative log-probability, elementwise in nats, of 8-bit values under a Gaussian.

    Each value x in [-1, 1] stands for the bin [x - 1/255, x + 1/255]; the first and last bins reach to
    infinity. Differences of normal CDFs are taken in log space, so that the result and its gradient stay
    finite however far the mean is.
    """
    inv_std = jnp.exp(-0.5 * log_var)
    upper, lower = inv_std * (x + 1 / 255 - mean), inv_std * (x - 1 / 255 - mean)
    # By symmetry, work in the lower tail, where log-CDFs keep their precision.
    flip = lower + upper > 0
    low = jnp.where(flip, -upper, lower)
    high = jnp.where(flip, -lower, upper)
    log_high, log_low = jax.scipy.stats.norm.logcdf(high), jax.scipy.stats.norm.logcdf(low)
    inside = log_high + jnp.log(-jnp.expm1(jnp.minimum(log_low - log_high, -1e-7)))
    log_prob = jnp.where(
        x < -0.999,
        jax.scipy.stats.norm.logcdf(upper),
        jnp.where(x > 0.999, jax.scipy.stats.norm.logcdf(-lower), inside),
    )
    return -log_prob


def variational_bits(
    prediction: jax.Array,
    v_frac: jax.Array,
    x0: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    tables: DiffusionTables,
    kind: str = "eps",
) -> jax.Array:
    """One term of the variational bound in bits per dimension. Gradients flow through the variance only.

    Args:
      prediction: (B, ...) the model's output of the given kind (its gradient is stopped).
      v_frac: (B, ...) learned variance fraction.
      x0, x_t: (B, ...); x0 in [-1, 1].
      t: (B,).
      kind: `eps`, `x0` or `v`.

    Returns:
      (B,) float32.
    """
    pick = lambda table: jnp.asarray(table)[t].reshape((-1,) + (1,) * (x0.ndim - 1))
    pred_x0, _ = to_x0_eps(
        jax.lax.stop_gradient(prediction), x_t, jnp.asarray(tables.alphas_cumprod)[t], kind
    )
    # As in sampling: an unclipped x0 at high noise is off by thousands and would swamp the term.
    pred_mean = pick(tables.x0_coef) * jnp.clip(pred_x0, -1, 1) + pick(tables.x_t_coef) * x_t
    true_mean = pick(tables.x0_coef) * x0 + pick(tables.x_t_coef) * x_t
    small, large = pick(tables.log_variance_small), pick(tables.log_variance_large)
    log_var = learned_log_variance(v_frac, small, large)
    kl = mean_per_example(normal_kl(true_mean, small, pred_mean, log_var))
    nll = mean_per_example(discretised_nll(x0, pred_mean, log_var))
    return jnp.where(t == 0, nll, kl) / math.log(2.0)


def split_variance(output: jax.Array, channels: int) -> tuple[jax.Array, jax.Array | None]:
    """Splits a U-Net's output (B, H, W, C or 2C) into the prediction and the variance fraction (output + 1) /
    2, None if absent.

    Raises:
      ValueError: when the output has neither C nor 2C channels.
    """
    if output.shape[-1] == channels:
        return output, None
    if output.shape[-1] != 2 * channels:
        raise InputError(
            f"the output has {output.shape[-1]} channels; expected {channels}, "
            f"or {2 * channels} with learned variance"
        )
    prediction, raw = jnp.split(output, 2, axis=-1)
    return prediction, (raw + 1) / 2


def hybrid_loss(
    prediction: jax.Array,
    v_frac: jax.Array | None,
    x0: jax.Array,
    eps: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    tables: Times,
    diffusion: dict,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a network with or without learned variance (Nichol and Dhariwal 2021, equation 16).

    Args:
      prediction, v_frac: as `split_variance` returns them.
      x0, eps, x_t: (B, ...); t: (B,).
      diffusion: the part's: `prediction`, `vb_weight`, `num_steps`.

    Returns:
      The loss (), and with learned variance its two terms: `simple`, and `vb_bits` in bits per dimension.
    """
    kind = diffusion["prediction"]
    simple = jnp.mean(simple_loss(prediction, x0, eps, t, tables, kind))
    if v_frac is None:
        return simple, {}
    bits = jnp.mean(variational_bits(prediction, v_frac, x0, x_t, t, tables, kind))
    return simple + diffusion["vb_weight"] * diffusion["num_steps"] * bits, {
        "simple": simple,
        "vb_bits": bits,
    }
