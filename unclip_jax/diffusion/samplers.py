"""Samplers: plain functions over a denoiser, each one `lax.scan` over precomputed coefficients.

ddpm  ancestral sampling, x_r ~ N(c0 x0 + ct x_t, Sigma) with the posterior of `process` (Ho et al. 2020)
ddim  x_r = sqrt(abar_r) x0 + sqrt(1 - abar_r - sigma^2) eps + sigma z,
      sigma = eta sqrt((1 - abar_r) / (1 - abar_t)) sqrt(1 - abar_t / abar_r)  (Song et al. 2021);
      eta 0 is deterministic
dpmpp_2m  DPM-Solver++(2M) (Lu et al. 2022), deterministic. Let lambda = ln(sqrt(abar) / sqrt(1 - abar)),
      h = lambda_r - lambda_t, and h', x0' the values of the previous step. Then
      x_r = sqrt((1 - abar_r) / (1 - abar_t)) x_t + sqrt(abar_r) (1 - e^-h) D,
      D = x0 + min(h / h', 1) / 2 (x0 - x0').
      The first and the last step (there h is infinite and x_r = D) are of first order: D = x0. The bound of 1
      is ours: with steps even in t, h grows without limit towards the clean sample, and the published h / h'
      extrapolates too far
ddim_invert  DDIM's map from data to noise at eta 0: x_n = sqrt(abar_n) x0 + sqrt(1 - abar_n) eps; x0 is never
      clipped
repaint  ancestral sampling of the unknown part of an image (Lugmayr et al. 2022)

The variance of ancestral sampling is that of the posterior (small) or of the forward step (large), one
learned between them, or the analytic one (Bao et al. 2022). The analytic variance is that of the data's own
reverse step: the posterior's plus c0^2 Var[x0 | x_t]. The mean of Var[x0 | x_t] is the squared error of a
perfect denoiser. A table of the network's errors, measured once, estimates it.

`steps` are descending integers in [0, T). The last one leads to the clean sample, where no noise is added.
Coefficients are float64 until they multiply the samples. Samples may be (B, D) embeddings or (B, H, W, C)
images.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.guidance import Denoise
from unclip_jax.diffusion.process import fold_in, learned_log_variance, posterior, standard_normal
from unclip_jax.diffusion.schedule import CLEAN, Schedule
from unclip_jax.errors import InputError

VARIANCES = ("small", "large", "learned", "analytic")


def transitions(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Descending steps -> (t, r): each step t and the next step r. The last step leads to the clean sample.

    Raises:
      ValueError: when the steps are empty or not strictly descending.
    """
    t = np.asarray(steps)
    if t.ndim != 1 or len(t) == 0 or np.any(np.diff(t) >= 0) or t[-1] < 0:
        raise InputError("sampling steps must be a non-empty, strictly descending list of steps >= 0")
    return t, np.append(t[1:], CLEAN)


def ddpm(
    denoise: Denoise,
    x: jax.Array,
    schedule: Schedule,
    steps: np.ndarray,
    rng: jax.Array,
    *,
    variance: str = "small",
    x0_error: np.ndarray | None = None,
) -> jax.Array:
    """Ancestral sampling.

    Args:
      denoise: the denoiser.
      x: (B, ...) a standard normal draw, the sample at the first step.
      schedule: of T steps.
      steps: descending steps, see `schedule.strided_steps`.
      rng: key of the noise, or (B,) keys, one per row.
      variance: `small` (posterior), `large` (forward step), `learned` (between them, by the denoiser's
      v_frac) or
        `analytic`.
      x0_error: (T,) mean squared error of x0 per time step and dimension, at most the data's variance; for
        `analytic`.

    Returns:
      (B, ...) samples.

    Raises:
      ValueError: on an unknown variance, `learned` with a denoiser that predicts none, or `analytic` without
        `x0_error`.
    """
    if variance not in VARIANCES:
        raise InputError(f"unknown variance {variance!r}; choose one of {', '.join(VARIANCES)}")
    t, r = transitions(steps)
    post = posterior(schedule, t, r)
    small = post.log_variance_small
    if variance == "analytic":
        if x0_error is None:
            raise InputError(
                "variance 'analytic' needs the network's measured errors (x0_error), which this network lacks"
            )
        errors = jnp.maximum(jnp.asarray(x0_error, jnp.float32)[t], 1e-30)
        small = jnp.logaddexp(
            jnp.asarray(small, jnp.float32),
            2 * jnp.log(jnp.asarray(post.x0_coef, jnp.float32)) + jnp.log(errors),
        )
    columns = (post.x0_coef, post.x_t_coef, small, post.log_variance_large)
    xs = (
        jnp.asarray(t),
        jnp.asarray(r != CLEAN, x.dtype),
        *(jnp.asarray(c, x.dtype) for c in columns),
        jnp.arange(len(t)),
    )

    def body(x, step):
        t, noisy, x0_coef, x_t_coef, small, large, i = step
        out = denoise(x, t)
        if variance == "learned":
            if out.v_frac is None:
                raise InputError(
                    "variance 'learned' needs a network that predicts it; use 'small' or 'large'"
                )
            log_variance = learned_log_variance(out.v_frac, small, large)
        else:
            log_variance = large if variance == "large" else small
        z = standard_normal(fold_in(rng, i), x.shape, x.dtype)
        return x0_coef * out.x0 + x_t_coef * x + noisy * jnp.exp(0.5 * log_variance) * z, None

    return jax.lax.scan(body, x, xs)[0]


def ddim(
    denoise: Denoise,
    x: jax.Array,
    schedule: Schedule,
    steps: np.ndarray,
    rng: jax.Array | None = None,
    *,
    eta: float = 0.0,
) -> jax.Array:
    """DDIM sampling.

    Args:
      denoise, x, schedule, steps: as in `ddpm`.
      rng: as in `ddpm`; may be None when eta is 0.
      eta: 0 for the deterministic map, 1 for the variance of ancestral sampling; in [0, 1].

    Returns:
      (B, ...) samples.

    Raises:
      ValueError: when eta is outside [0, 1], or positive without a key.
    """
    if not 0 <= eta <= 1:
        raise InputError(f"DDIM's eta must be in [0, 1], got {eta}")
    if eta > 0 and rng is None:
        raise InputError("DDIM with eta > 0 needs a random key")
    t, r = transitions(steps)
    abar_t, abar_r = schedule.abar(t), schedule.abar(r)
    sigma = eta * np.sqrt((1 - abar_r) / (1 - abar_t) * (1 - abar_t / abar_r))
    columns = (np.sqrt(abar_r), np.sqrt(np.maximum(1 - abar_r - sigma**2, 0)), sigma)
    xs = (jnp.asarray(t), *(jnp.asarray(c, x.dtype) for c in columns), jnp.arange(len(t)))

    def body(x, step):
        t, x0_coef, eps_coef, sigma, i = step
        out = denoise(x, t)
        x = x0_coef * out.x0 + eps_coef * out.eps
        if eta > 0:
            x = x + sigma * standard_normal(fold_in(rng, i), x.shape, x.dtype)
        return x, None

    return jax.lax.scan(body, x, xs)[0]


def dpmpp_2m(
    denoise: Denoise, x: jax.Array, schedule: Schedule, steps: np.ndarray, rng: jax.Array | None = None
) -> jax.Array:
    """DPM-Solver++(2M): second order, with one evaluation per step.

    Args:
      denoise, x, schedule, steps: as in `ddpm`.
      rng: not used; all samplers share one signature.

    Returns:
      (B, ...) samples.
    """
    t, r = transitions(steps)
    abar_t, abar_r = schedule.abar(t), schedule.abar(r)
    with np.errstate(divide="ignore"):
        h = 0.5 * (np.log(abar_r) - np.log1p(-abar_r) - np.log(abar_t) + np.log1p(-abar_t))
    extrapolate = np.zeros(len(t))
    extrapolate[1:-1] = np.minimum(h[1:-1] / (2 * h[:-2]), 0.5)
    columns = (np.sqrt((1 - abar_r) / (1 - abar_t)), np.sqrt(abar_r) * -np.expm1(-h), extrapolate)
    xs = (jnp.asarray(t), *(jnp.asarray(c, x.dtype) for c in columns))

    def body(carry, step):
        x, before = carry
        t, x_coef, d_coef, extrapolate = step
        x0 = denoise(x, t).x0
        return (x_coef * x + d_coef * (x0 + extrapolate * (x0 - before)), x0), None

    return jax.lax.scan(body, (x, jnp.zeros_like(x)), xs)[0][0]


def ddim_invert(denoise: Denoise, x: jax.Array, schedule: Schedule, steps: np.ndarray) -> jax.Array:
    """Runs DDIM backwards: finds the noise that DDIM (eta 0) over the same steps turns into the clean sample.

    The network predicts the noise of each step one step early, so the error of a round trip is
    O(1 / number of steps).

    Args:
      denoise: the denoiser, made without clipping.
      x: (B, ...) clean samples.
      schedule, steps: as in `ddim` (descending).

    Returns:
      (B, ...) the latent x_T of each sample.
    """
    t, r = transitions(steps)
    # The first move starts at the clean sample, which the network sees as its lowest step.
    n, now = t[::-1], np.maximum(r[::-1], t[-1])
    abar_now, abar_n = schedule.abar(r[::-1]), schedule.abar(n)
    # x is known at abar_now; split it with the predicted eps, then rebuild it at abar_n.
    columns = (np.sqrt(abar_n / abar_now), np.sqrt(1 - abar_n) - np.sqrt(abar_n / abar_now * (1 - abar_now)))
    xs = (jnp.asarray(now), *(jnp.asarray(c, x.dtype) for c in columns))

    def body(x, step):
        t, scale, eps_coef = step
        return scale * x + eps_coef * denoise(x, t).eps, None

    return jax.lax.scan(body, x, xs)[0]


def repaint(
    denoise: Denoise,
    x: jax.Array,
    schedule: Schedule,
    steps: np.ndarray,
    rng: jax.Array,
    *,
    image: jax.Array,
    known: jax.Array,
    resamples: int = 5,
) -> jax.Array:
    """Fills the unknown part of an image by ancestral sampling, with any network (RePaint, Lugmayr et al.
    2022).

    After every step, the image noised to that step replaces the known part. The step did not see this
    content, so the sample is noised back and the step repeated. Each step is made `resamples` times in all.

    Args:
      denoise, x, schedule, steps, rng: as in `ddpm`.
      image: (B, ...) the clean image; only its known part is used.
      known: bool, broadcastable to the image; True where the image is kept.
      resamples: passes per step, at least 1.

    Returns:
      (B, ...) samples, equal to the image where it is known.

    Raises:
      ValueError: when resamples is below 1.
    """
    if resamples < 1:
        raise InputError(f"resamples must be at least 1, got {resamples}")
    t, r = transitions(steps)
    # Every step has `resamples` passes, and all but the last pass go back. The step to the clean sample has
    # one.
    passes = np.where(np.arange(len(t)) < len(t) - 1, resamples, 1)
    last = np.concatenate([np.arange(n) == n - 1 for n in passes])
    t, r = np.repeat(t, passes), np.repeat(r, passes)
    post, abar_t, abar_r = posterior(schedule, t, r), schedule.abar(t), schedule.abar(r)
    columns = (
        *(post.x0_coef, post.x_t_coef, np.sqrt(post.variance)),
        *(np.sqrt(abar_r), np.sqrt(1 - abar_r)),
        *(np.where(last, 1.0, np.sqrt(abar_t / abar_r)), np.where(last, 0.0, np.sqrt(1 - abar_t / abar_r))),
    )
    xs = (jnp.asarray(t), *(jnp.asarray(c, x.dtype) for c in columns), jnp.arange(len(t)))

    def body(x, step):
        t, x0_coef, x_t_coef, sigma, signal, noise, back, back_noise, i = step
        z = [standard_normal(fold_in(rng, 3 * i + k), x.shape, x.dtype) for k in range(3)]
        drawn = x0_coef * denoise(x, t).x0 + x_t_coef * x + sigma * z[0]
        x = jnp.where(known, signal * image + noise * z[1], drawn)
        return back * x + back_noise * z[2], None

    return jax.lax.scan(body, x, xs)[0]


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m}
