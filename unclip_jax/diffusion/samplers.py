"""Samplers: plain functions over a denoiser, each one `lax.scan` over precomputed coefficients.

ddpm  ancestral sampling, x_r ~ N(c0 x0 + ct x_t, Sigma) with the posterior of `process` (Ho et al. 2020)
ddim  x_r = sqrt(abar_r) x0 + sqrt(1 - abar_r - sigma^2) eps + sigma z,
      sigma = eta sqrt((1 - abar_r) / (1 - abar_t)) sqrt(1 - abar_t / abar_r)  (Song et al. 2021); eta 0 is deterministic
ddim_invert  the same map run from data to noise at eta 0: x_n = sqrt(abar_n) x0 + sqrt(1 - abar_n) eps, x0 never clipped

`steps` are descending integers in [0, T); the last one leads to the clean sample, where no noise is added. Coefficients are float64
until they meet the samples. Samples may be (B, D) embeddings or (B, H, W, C) images.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.guidance import Denoise
from unclip_jax.diffusion.process import fold_in, learned_log_variance, posterior, standard_normal
from unclip_jax.diffusion.schedule import CLEAN, Schedule

VARIANCES = ("small", "large", "learned")


def transitions(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Descending steps -> (t, r): from each step to the next, the last to the clean sample.

    Raises:
      ValueError: when the steps are empty or not strictly descending.
    """
    t = np.asarray(steps)
    if t.ndim != 1 or len(t) == 0 or np.any(np.diff(t) >= 0) or t[-1] < 0:
        raise ValueError("sampling steps must be a non-empty, strictly descending list of steps >= 0")
    return t, np.append(t[1:], CLEAN)


def ddpm(
    denoise: Denoise, x: jax.Array, schedule: Schedule, steps: np.ndarray, rng: jax.Array, *, variance: str = "small"
) -> jax.Array:
    """Ancestral sampling.

    Args:
      denoise: the denoiser.
      x: (B, ...) a standard normal draw, the sample at the first step.
      schedule: of T steps.
      steps: descending steps, see `schedule.strided_steps`.
      rng: key of the noise, or (B,) keys, one per row.
      variance: `small` (posterior), `large` (forward step) or `learned` (between them by the denoiser's v_frac).

    Returns:
      (B, ...) samples.

    Raises:
      ValueError: on an unknown variance, or `learned` with a denoiser that has none.
    """
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}; choose one of {', '.join(VARIANCES)}")
    t, r = transitions(steps)
    post = posterior(schedule, t, r)
    columns = (post.x0_coef, post.x_t_coef, post.log_variance_small, post.log_variance_large)
    xs = (jnp.asarray(t), jnp.asarray(r != CLEAN, x.dtype), *(jnp.asarray(c, x.dtype) for c in columns), jnp.arange(len(t)))

    def body(x, step):
        t, noisy, x0_coef, x_t_coef, small, large, i = step
        out = denoise(x, t)
        if variance == "learned":
            if out.v_frac is None:
                raise ValueError("variance 'learned' needs a network that predicts it; use 'small' or 'large'")
            log_variance = learned_log_variance(out.v_frac, small, large)
        else:
            log_variance = small if variance == "small" else large
        z = standard_normal(fold_in(rng, i), x.shape, x.dtype)
        return x0_coef * out.x0 + x_t_coef * x + noisy * jnp.exp(0.5 * log_variance) * z, None

    return jax.lax.scan(body, x, xs)[0]


def ddim(
    denoise: Denoise, x: jax.Array, schedule: Schedule, steps: np.ndarray, rng: jax.Array | None = None, *, eta: float = 0.0
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
        raise ValueError(f"DDIM's eta must be in [0, 1], got {eta}")
    if eta > 0 and rng is None:
        raise ValueError("DDIM with eta > 0 needs a random key")
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


def ddim_invert(denoise: Denoise, x: jax.Array, schedule: Schedule, steps: np.ndarray) -> jax.Array:
    """Runs DDIM backwards, from a clean sample to the noise that DDIM (eta 0) over the same steps turns back into it.

    The noise at each step is predicted one step early, so a round trip errs by O(1 / number of steps).

    Args:
      denoise: the denoiser, made without clipping.
      x: (B, ...) clean samples.
      schedule, steps: as in `ddim` (descending).

    Returns:
      (B, ...) the latent x_T of each sample.
    """
    t, r = transitions(steps)
    n, now = t[::-1], np.maximum(r[::-1], t[-1])  # the first move starts at the clean sample, seen by the network as its lowest step
    abar_now, abar_n = schedule.abar(r[::-1]), schedule.abar(n)
    # x is known at abar_now; split it with the predicted eps, then rebuild it at abar_n.
    columns = (np.sqrt(abar_n / abar_now), np.sqrt(1 - abar_n) - np.sqrt(abar_n / abar_now * (1 - abar_now)))
    xs = (jnp.asarray(now), *(jnp.asarray(c, x.dtype) for c in columns))

    def body(x, step):
        t, scale, eps_coef = step
        return scale * x + eps_coef * denoise(x, t).eps, None

    return jax.lax.scan(body, x, xs)[0]


SAMPLERS = {"ddpm": ddpm, "ddim": ddim}
