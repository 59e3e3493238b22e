"""Samplers: plain functions over a denoiser, each one `lax.scan` over precomputed coefficients.

ddpm  ancestral sampling, x_r ~ N(c0 x0 + ct x_t, Sigma) with the posterior of `process` (Ho et al. 2020)
ddim  x_r = sqrt(abar_r) x0 + sqrt(1 - abar_r - sigma^2) eps + sigma z,
      sigma = eta sqrt((1 - abar_r) / (1 - abar_t)) sqrt(1 - abar_t / abar_r)  (Song et al. 2021);
      eta 0 is deterministic
dpmpp_2m  DPM-Solver++(2M) (Lu et al. 2022), deterministic. Let lambda = ln(sqrt(abar) / sqrt(1 - abar)),
      h = lambda_r - lambda_t, and h', x0' the values of the previous step. Then
      x_r = sqrt((1 - abar_r) / (1 - abar_t)) x_t + sqrt(abar_r) (1 - e^-h) D,
      D = x0 + min(h / h', 1) / 2 (x0 - x0').
      The first step is of first order: D = x0. So is the last one where it leads to the clean sample (there h
      is infinite and x_r = D), or where there are fewer than 15. The bound of 1 is ours: with steps even in
      t, h grows without limit towards the clean sample, and the published h / h' extrapolates too far
plms  the pseudo linear multistep method (Liu et al. 2022, F-PNDM without its Runge-Kutta steps): DDIM at eta
      0 with a combination of the last four outputs of the network, (55 e - 59 e_1 + 37 e_2 - 9 e_3) / 24, in
      place of the last one. It begins with one step of Heun's method, which calls the network once more, and
      with the formulas of order two and three. What is combined is the network's own output: v where it
      predicts v
euler  Euler's method in y = x / sqrt(abar), whose noise is sigma = sqrt((1 - abar) / abar) (Karras et al.
      2022): y_r = y + (sigma_r - sigma_t) eps. As y = x0 + sigma_t eps, this is y_r = x0 + sigma_r eps, which
      is DDIM at eta 0
euler_ancestral  goes down to sigma_d and adds noise sigma_u: sigma_u^2 = sigma_r^2 (1 - sigma_r^2 /
      sigma_t^2) and sigma_d^2 = sigma_r^2 - sigma_u^2. As 1 - sigma_r^2 / sigma_t^2 =
      (1 - abar_t / abar_r) / (1 - abar_t), abar_r sigma_u^2 is DDIM's sigma^2 at eta 1: it is DDIM at eta 1
ddim_invert  DDIM's map from data to noise at eta 0: x_n = sqrt(abar_n) x0 + sqrt(1 - abar_n) eps; x0 is never
      clipped
repaint  ancestral sampling of the unknown part of an image (Lugmayr et al. 2022)

The variance of ancestral sampling is that of the posterior (small) or of the forward step (large), one
learned between them, or the analytic one (Bao et al. 2022). The analytic variance is that of the data's own
reverse step: the posterior's plus c0^2 Var[x0 | x_t]. The mean of Var[x0 | x_t] is the squared error of a
perfect denoiser. A table of the network's errors, measured once, estimates it.

`steps` are descending integers in [0, T). Each leads to the next, and the last one to the clean sample, where
no noise is added. `spacing.Moves` in their place say where each step leads.
Coefficients are float64 until they multiply the samples. Samples may be (B, D) embeddings or (B, H, W, C)
images.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.guidance import Denoise
from unclip_jax.diffusion.loops import Loop, scan
from unclip_jax.diffusion.process import fold_in, learned_log_variance, posterior, standard_normal
from unclip_jax.diffusion.schedule import CLEAN, SMALLEST_ABAR, Schedule
from unclip_jax.diffusion.spacing import Moves
from unclip_jax.errors import InputError

VARIANCES = ("small", "large", "learned", "analytic")


def transitions(steps: np.ndarray | Moves) -> Moves:
    """Descending steps -> (t, r): each step t and the next step r. The last step leads to the clean sample.
    Moves are returned as they are.

    Raises:
      ValueError: when the steps are empty or not strictly descending.
    """
    if isinstance(steps, Moves):
        return steps
    t = np.asarray(steps)
    if t.ndim != 1 or len(t) == 0 or np.any(np.diff(t) >= 0) or t[-1] < 0:
        raise InputError("sampling steps must be a non-empty, strictly descending list of steps >= 0")
    return Moves(t, np.append(t[1:], CLEAN))


def ddpm(
    denoise: Denoise,
    x: jax.Array,
    schedule: Schedule,
    steps: np.ndarray | Moves,
    rng: jax.Array,
    *,
    variance: str = "small",
    x0_error: np.ndarray | None = None,
    loop: Loop = scan,
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
      loop: runs the steps; a `loops.Segment` runs some of them. All samplers have it.

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
        mean = x0_coef * out.x0 + x_t_coef * x
        if out.score is not None:
            mean = mean + jnp.exp(log_variance) * out.score
        return mean + noisy * jnp.exp(0.5 * log_variance) * z, None

    return loop(body, x, xs)


def ddim(
    denoise: Denoise,
    x: jax.Array,
    schedule: Schedule,
    steps: np.ndarray | Moves,
    rng: jax.Array | None = None,
    *,
    eta: float = 0.0,
    smallest_abar: float = 0.0,
    loop: Loop = scan,
) -> jax.Array:
    """DDIM sampling.

    Args:
      denoise, x, schedule, steps: as in `ddpm`.
      rng: as in `ddpm`; may be None when eta is 0.
      eta: 0 for the deterministic map, 1 for the variance of ancestral sampling; in [0, 1].
      smallest_abar: a lower bound of abar_t in sigma.

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
    abar_t, abar_r = np.maximum(schedule.abar(t), smallest_abar), schedule.abar(r)
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

    return loop(body, x, xs)


def dpmpp_2m(
    denoise: Denoise,
    x: jax.Array,
    schedule: Schedule,
    steps: np.ndarray | Moves,
    rng: jax.Array | None = None,
    *,
    bound: float | None = 1.0,
    left_out: int = 0,
    loop: Loop = scan,
) -> jax.Array:
    """DPM-Solver++(2M): second order, with one evaluation per step.

    Args:
      denoise, x, schedule, steps: as in `ddpm`.
      rng: not used; all samplers share one signature.
      bound: of h / h'; None for the published method.
      left_out: steps before these that sampling from a picture leaves out. They count in the rule of 15.

    Returns:
      (B, ...) samples.
    """
    t, r = transitions(steps)
    abar_t, abar_r = np.maximum(schedule.abar(t), SMALLEST_ABAR), schedule.abar(r)
    with np.errstate(divide="ignore"):
        h = 0.5 * (np.log(abar_r) - np.log1p(-abar_r) - np.log(abar_t) + np.log1p(-abar_t))
    end = len(t) if r[-1] != CLEAN and left_out + len(t) >= 15 else len(t) - 1
    extrapolate = np.zeros(len(t))
    extrapolate[1:end] = np.minimum(h[1:end] / h[: max(end - 1, 0)], np.inf if bound is None else bound) / 2
    columns = (np.sqrt((1 - abar_r) / (1 - abar_t)), np.sqrt(abar_r) * -np.expm1(-h), extrapolate)
    xs = (jnp.asarray(t), *(jnp.asarray(c, x.dtype) for c in columns))

    def body(carry, step):
        x, before = carry
        t, x_coef, d_coef, extrapolate = step
        x0 = denoise(x, t).x0
        return (x_coef * x + d_coef * (x0 + extrapolate * (x0 - before)), x0), None

    return loop(body, (x, jnp.zeros_like(x)), xs)[0]


def euler(
    denoise: Denoise,
    x: jax.Array,
    schedule: Schedule,
    steps: np.ndarray | Moves,
    rng: jax.Array | None = None,
    *,
    noise_scale: float = 1.0,
    eta: float = 0.0,
    loop: Loop = scan,
) -> jax.Array:
    """Euler's method, or with eta 1 its ancestral form: DDIM (module docstring).

    Args:
      denoise, x, schedule, steps, rng: as in `ddim`.
      noise_scale: x is multiplied by it first. It is 1 where x stands for a sample at the first step. Where
        the steps begin at T - 1, diffusers starts without the signal's part of the variance: sqrt(1 - abar).
      eta: 0, or 1 for the ancestral form.

    Returns:
      (B, ...) y at the last level: where that is not the clean sample, its noise is not scaled down.
    """
    moves = transitions(steps)
    x = ddim(denoise, noise_scale * x, schedule, moves, rng, eta=eta, smallest_abar=SMALLEST_ABAR, loop=loop)
    return x / float(np.sqrt(schedule.abar(moves.r[-1])))


def euler_ancestral(
    denoise: Denoise,
    x: jax.Array,
    schedule: Schedule,
    steps: np.ndarray | Moves,
    rng: jax.Array,
    *,
    noise_scale: float = 1.0,
    loop: Loop = scan,
) -> jax.Array:
    """Euler's method with noise; the arguments are those of `euler`."""
    return euler(denoise, x, schedule, steps, rng, noise_scale=noise_scale, eta=1.0, loop=loop)


# What `plms` combines at its first five calls: weights of the network's last outputs, the newest first.
ADAMS_BASHFORTH = (
    (1, 0, 0, 0),
    (1 / 2, 1 / 2, 0, 0),
    (3 / 2, -1 / 2, 0, 0),
    (23 / 12, -16 / 12, 5 / 12, 0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def plms(
    denoise: Denoise,
    x: jax.Array,
    schedule: Schedule,
    steps: np.ndarray | Moves,
    rng: jax.Array | None = None,
    *,
    prediction: str = "eps",
    loop: Loop = scan,
) -> jax.Array:
    """The pseudo linear multistep method (module docstring): one evaluation per step, and one more.

    Args:
      denoise, x, schedule, steps: as in `ddpm`.
      rng: not used.
      prediction: `eps` or `v`: what is combined.

    Returns:
      (B, ...) samples.

    Raises:
      ValueError: on another prediction.
    """
    if prediction not in ("eps", "v"):
        raise InputError(f"plms combines predictions of eps or v, not of {prediction!r}")
    t, r = transitions(steps)
    stride = t[0] - r[0]
    # The calls: (step that the network sees, level of the sample that is moved, level that it is moved to).
    # The second call is at the end of the first move, and the move is made again from its start.
    calls = [(t[0], t[0], r[0])]
    if len(t) > 1:
        calls += [(t[1], t[1] + stride, t[1]), *zip(t[1:], t[1:], r[1:])]
    seen, start, end = np.array(calls).T
    abar_s, abar_e, abar_seen = schedule.abar(start), schedule.abar(end), schedule.abar(seen)
    scale = np.sqrt(abar_e / abar_s)
    per_eps = np.sqrt(1 - abar_e) - scale * np.sqrt(1 - abar_s)
    x_coef, e_coef = scale, per_eps
    if prediction == "v":  # eps = sqrt(abar_s) v + sqrt(1 - abar_s) x at the start
        x_coef, e_coef = scale + per_eps * np.sqrt(1 - abar_s), per_eps * np.sqrt(abar_s)
    weights = np.array([ADAMS_BASHFORTH[min(i, 4)] for i in range(len(calls))])
    columns = (x_coef, e_coef, np.sqrt(abar_seen), np.sqrt(1 - abar_seen), weights)
    again = jnp.arange(len(calls)) == 1
    xs = (jnp.asarray(seen), again, *(jnp.asarray(c, x.dtype) for c in columns))

    def body(carry, call):
        x, before, history = carry
        t, again, x_coef, e_coef, signal, noise, weights = call
        out = denoise(x, t)
        e = out.eps if prediction == "eps" else signal * out.eps - noise * out.x0
        combined = weights[0] * e + sum(w * old for w, old in zip(weights[1:], history))
        moved = x_coef * jnp.where(again, before, x) + e_coef * combined
        history = jax.tree.map(lambda new, old: jnp.where(again, old, new), (e, *history[:2]), history)
        return (moved, x, history), None

    zeros = jnp.zeros_like(x)
    return loop(body, (x, x, (zeros, zeros, zeros)), xs)[0]


def ddim_invert(denoise: Denoise, x: jax.Array, schedule: Schedule, steps: np.ndarray | Moves) -> jax.Array:
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
    steps: np.ndarray | Moves,
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


SAMPLERS = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "plms": plms,
}
