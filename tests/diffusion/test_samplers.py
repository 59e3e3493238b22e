"""Samplers on a Gaussian, whose perfect denoiser is known.

With x0 ~ N(MEAN, STD^2) per dimension and a = sqrt(abar_t), E[x0 | x_t] = MEAN + a STD^2 / (a^2 STD^2 + 1 -
a^2) (x_t - a MEAN).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion.guidance import Denoised, make_denoiser
from unclip_jax.diffusion.process import posterior
from unclip_jax.diffusion.samplers import (
    SAMPLERS,
    VARIANCES,
    ddim,
    ddim_invert,
    ddpm,
    dpmpp_2m,
    repaint,
    transitions,
)
from unclip_jax.diffusion.schedule import make_schedule, strided_steps

MEAN, STD = np.array([0.3, -0.6, 0.0, 0.8]), np.array([0.5, 0.2, 1.0, 0.35])
COSINE, LINEAR = make_schedule("cosine"), make_schedule("linear")
N = 5_000


def perfect(schedule, prediction, fraction=None):
    """The perfect denoiser, unclipped; `fraction` (T, 4), if given, is its variance fraction at each step."""
    table = jnp.asarray(schedule.alphas_cumprod, jnp.float32)

    def model(x, t):
        abar = table[t][:, None]
        a, total = jnp.sqrt(abar), abar * STD**2 + 1 - abar
        x0, eps = MEAN + a * STD**2 / total * (x - a * MEAN), jnp.sqrt(1 - abar) / total * (x - a * MEAN)
        out = eps if prediction == "eps" else x0
        return (
            out
            if fraction is None
            else jnp.concatenate([out, 2 * jnp.asarray(fraction, jnp.float32)[t] - 1], axis=-1)
        )

    return make_denoiser(model, schedule, prediction=prediction)


def noise(key, rows=N):
    return jax.random.normal(jax.random.key(key), (rows, 4))


def assert_gaussian(x):
    """Checks the mean and the variance of x (N, 4).

    The tolerance is four standard errors, plus half a per cent for the finite number of steps.
    """
    x = np.asarray(x)
    np.testing.assert_array_less(np.abs(x.mean(0) - MEAN), 4 * STD / np.sqrt(len(x)) + 0.005 * STD)
    np.testing.assert_array_less(np.abs(x.var(0) / STD**2 - 1), 4 * np.sqrt(2 / len(x)) + 0.005)


def round_trip_error(schedule, prediction, count):
    denoise, steps = perfect(schedule, prediction), strided_steps(1000, count)
    x = MEAN + STD * noise(0, 512)
    back = jax.jit(lambda x: ddim(denoise, ddim_invert(denoise, x, schedule, steps), schedule, steps))(x)
    return float(jnp.sqrt(jnp.mean((back - x) ** 2)))


@pytest.mark.parametrize("schedule, prediction, bound", [(COSINE, "eps", 0.01), (LINEAR, "x0", 0.015)])
def test_inversion_round_trip_is_first_order(schedule, prediction, bound):
    """DDIM undoes ddim_invert up to an error that halves as the steps double."""
    errors = [round_trip_error(schedule, prediction, count) for count in (60, 120, 250)]
    assert errors[-1] < bound
    for coarse, fine in zip(errors, errors[1:]):
        assert 1.6 < coarse / fine < 2.6, errors


def test_inversion_reaches_the_noise():
    """The latent of a Gaussian under the probability flow is its own standardised value."""
    z = noise(0, 512)
    latent = jax.jit(lambda x: ddim_invert(perfect(COSINE, "eps"), x, COSINE, strided_steps(1000, 500)))(
        MEAN + STD * z
    )
    np.testing.assert_allclose(latent, z, atol=0.05)


def test_ddim_samples_the_gaussian():
    """Deterministic and ancestral."""
    steps, key = strided_steps(1000, 500), jax.random.key(1)
    sample = jax.jit(
        lambda x: [ddim(perfect(COSINE, "eps"), x, COSINE, steps, key, eta=eta) for eta in (0.0, 1.0)]
    )
    for out in sample(noise(2)):
        assert_gaussian(out)


def test_ddpm_samples_the_gaussian():
    """With all steps, either fixed variance is right."""
    steps, key = strided_steps(1000, 1000), jax.random.key(1)
    sample = jax.jit(
        lambda x: [ddpm(perfect(LINEAR, "x0"), x, LINEAR, steps, key, variance=v) for v in ("small", "large")]
    )
    for out in sample(noise(2)):
        assert_gaussian(out)


@pytest.mark.parametrize("count", [6, 40])
def test_ddpm_with_the_exact_learned_variance_needs_few_steps(count):
    """With the exact variance, samples are exact at any number of steps.

    The true reverse step of a Gaussian is N(posterior mean at E[x0], posterior variance + c0^2 Var[x0 |
    x_t]). Its variance lies inside the learned range, since STD <= 1.
    """
    steps = strided_steps(1000, count)
    t, r = transitions(steps)
    post, abar = posterior(COSINE, t, r), COSINE.abar(t)
    var_x0 = STD**2 * ((1 - abar) / (abar[:, None] * STD**2 + (1 - abar)[:, None]).T).T
    exact = post.variance[:, None] + post.x0_coef[:, None] ** 2 * var_x0
    small, large = post.log_variance_small[:, None], post.log_variance_large[:, None]
    fraction = np.zeros((1000, 4))
    fraction[t] = (np.log(exact) - small) / (large - small)
    assert fraction[t[:-1]].min() > 0 and fraction[t[:-1]].max() < 1 + 1e-9
    denoise = perfect(COSINE, "x0", fraction)
    assert_gaussian(
        jax.jit(lambda x: ddpm(denoise, x, COSINE, steps, jax.random.key(1), variance="learned"))(noise(2))
    )


def stopped(denoise, step):
    """The denoiser, except that at `step` it returns its input.

    A chain that ends there returns its state before the last move.
    """
    return lambda x, t: denoise(x, t)._replace(x0=jnp.where(t == step, x, denoise(x, t).x0))


def test_limits_of_the_learned_range():
    """A fraction of 0 is the posterior's variance, of 1 the forward step's; the two differ."""
    x, steps = noise(3, 64), np.array([700, 400, 100])

    @jax.jit
    def run(v):
        denoise = stopped(lambda x, t: Denoised(0.5 * x, x, jnp.full_like(x, v)), 100)
        return [
            ddpm(denoise, x, COSINE, steps, jax.random.key(4), variance=variance)
            for variance in ("learned", "small", "large")
        ]

    low, small, large = run(0.0)
    np.testing.assert_allclose(low, small, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(run(1.0)[0], large, rtol=1e-4, atol=1e-5)
    assert not np.allclose(small, large, rtol=1e-2)


def test_no_noise_at_the_last_step():
    """A single step returns the denoiser's x0 itself, whatever the sampler and its variance."""
    x, step = noise(5, 8), np.array([600])
    denoise = perfect(COSINE, "x0", np.full((1000, 4), 0.5))

    @jax.jit
    def run(x, key):
        ancestral = [
            ddpm(denoise, x, COSINE, step, key, variance=variance, x0_error=np.ones(1000))
            for variance in VARIANCES
        ]
        return [*ancestral, ddim(denoise, x, COSINE, step, key, eta=1.0), ddim(denoise, x, COSINE, step)]

    for out in run(x, jax.random.key(6)):
        np.testing.assert_allclose(out, denoise(x, jnp.array(600)).x0, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sampler, options", [("ddpm", {}), ("ddim", {"eta": 0.7})])
def test_a_row_with_its_own_key_does_not_see_the_batch(sampler, options):
    """Row 3 of a batch of 5 equals the row sampled alone.

    The noise differs between rows and between keys.
    """
    denoise, steps = perfect(COSINE, "eps"), strided_steps(1000, 8)
    sample = jax.jit(lambda x, keys: SAMPLERS[sampler](denoise, x, COSINE, steps, keys, **options))
    x = jnp.broadcast_to(noise(7, 1), (5, 4))
    keys = jax.random.split(jax.random.key(8), 5)
    batch = sample(x, keys)
    np.testing.assert_allclose(batch[3:4], sample(x[:1], keys[3:4]), rtol=1e-5, atol=1e-6)
    assert np.all(np.std(batch, axis=0) > 0.01)


def test_every_eta_keeps_the_variance_of_a_step():
    """sigma^2 and the squared coefficient of eps sum to 1 - abar_r.

    With x0 = 0 and eps standard normal, every eta therefore gives N(0, 1 - abar_r).
    """
    denoise, steps = stopped(lambda x, t: Denoised(jnp.zeros_like(x), x, None), 300), np.array([999, 300])
    run = jax.jit(
        lambda x: [ddim(denoise, x, COSINE, steps, jax.random.key(10), eta=eta) for eta in (0.0, 0.5, 1.0)]
    )
    for out in run(noise(9)):
        np.testing.assert_allclose(np.var(out), 1 - COSINE.alphas_cumprod[300], rtol=0.05)


def test_bad_arguments():
    """Each error names the argument and the choices."""
    denoise, x, key = perfect(COSINE, "eps"), noise(0, 2), jax.random.key(0)
    with pytest.raises(ValueError, match=f"'tiny'.*{', '.join(VARIANCES)}"):
        ddpm(denoise, x, COSINE, np.array([5, 2]), key, variance="tiny")
    with pytest.raises(ValueError, match="needs a network that predicts it"):
        ddpm(denoise, x, COSINE, np.array([5, 2]), key, variance="learned")
    with pytest.raises(ValueError, match=r"\[0, 1\], got 1.5"):
        ddim(denoise, x, COSINE, np.array([5, 2]), key, eta=1.5)
    with pytest.raises(ValueError, match="random key"):
        ddim(denoise, x, COSINE, np.array([5, 2]), eta=0.5)
    for steps in ([], [3, 3], [1, 5], [5, -1], [[5, 2]]):
        with pytest.raises(ValueError, match="strictly descending"):
            ddim(denoise, x, COSINE, np.array(steps, int))


def isotropic(schedule, std):
    """The perfect denoiser of N(0.3, std^2) in every dimension, and its mean squared error per step."""
    table = schedule.alphas_cumprod

    def model(x, t):
        abar = jnp.asarray(table, jnp.float32)[t][:, None]
        return 0.3 + jnp.sqrt(abar) * std**2 / (abar * std**2 + 1 - abar) * (x - jnp.sqrt(abar) * 0.3)

    return make_denoiser(model, schedule, prediction="x0"), std**2 * (1 - table) / (
        table * std**2 + 1 - table
    )


@pytest.mark.parametrize("std", [0.5, 3.0])
def test_analytic_variance_needs_few_steps(std):
    """With the denoiser's true errors, six steps sample a Gaussian exactly.

    This holds also for a Gaussian that is wider than the learned range allows. The posterior's variance is
    too small for it.
    """
    denoise, x0_error = isotropic(COSINE, std)
    steps = strided_steps(1000, 6)
    run = lambda x, **kw: ddpm(denoise, x, COSINE, steps, jax.random.key(1), **kw)
    exact, small = jax.jit(lambda x: (run(x, variance="analytic", x0_error=x0_error), run(x)))(noise(5))
    for value, off in ((np.asarray(exact), 0.0), (np.asarray(small), 0.1)):
        error = abs(value.std() / std - 1)
        assert (error < 3 / np.sqrt(2 * value.size) + 0.004) if not off else (error > off), error
    np.testing.assert_allclose(np.mean(exact), 0.3, atol=4 * std / np.sqrt(exact.size))
    with pytest.raises(ValueError, match="needs the network's measured errors"):
        run(noise(5, 2), variance="analytic")


def mixture(schedule):
    """The perfect denoiser of two Gaussians at +-1 with unequal weights, per dimension."""
    centres, weights, std = jnp.array([-1.0, 1.0]), jnp.array([0.3, 0.7]), 0.5
    table = jnp.asarray(schedule.alphas_cumprod, jnp.float32)

    def model(x, t):
        abar = table[t][:, None, None]
        a, total = jnp.sqrt(abar), abar * std**2 + 1 - abar
        off = x[..., None] - a * centres
        share = jax.nn.softmax(jnp.log(weights) - 0.5 * off**2 / total, axis=-1)
        return jnp.sum(share * (centres + a * std**2 / total * off), axis=-1)

    return make_denoiser(model, schedule, prediction="x0")


@pytest.mark.parametrize("schedule", [COSINE, LINEAR])
def test_second_order_is_nearer_the_answer(schedule):
    """DPM-Solver++(2M) is nearer than DDIM to the 1,000-step result on a mixture.

    Both take the same number of steps, and the solver's error falls faster.
    """
    denoise, x = mixture(schedule), noise(6, 512)
    run = jax.jit(
        lambda x: [
            [s(denoise, x, schedule, strided_steps(1000, n)) for n in (16, 32)] for s in (ddim, dpmpp_2m)
        ]
    )
    answer = jax.jit(lambda x: ddim(denoise, x, schedule, strided_steps(1000, 1000)))(x)
    first, second = (np.array([np.sqrt(np.mean((y - answer) ** 2)) for y in ys]) for ys in run(x))
    assert np.all(second < 0.5 * first), (first, second)
    assert first[0] / first[1] < second[0] / second[1], (first, second)


def test_one_and_two_steps_of_the_solver():
    """A single step returns the denoiser's x0.

    The last of two steps is of first order, so it also returns the x0 at the last step.
    """
    denoise, x = mixture(COSINE), noise(7, 8)
    np.testing.assert_allclose(
        dpmpp_2m(denoise, x, COSINE, np.array([700])), denoise(x, jnp.array(700)).x0, rtol=1e-6
    )
    middle = ddim(
        stopped(denoise, 200), x, COSINE, np.array([700, 200])
    )  # to first order the two are the same map
    np.testing.assert_allclose(
        dpmpp_2m(denoise, x, COSINE, np.array([700, 200])),
        denoise(middle, jnp.array(200)).x0,
        rtol=1e-4,
        atol=1e-5,
    )


def test_repaint_draws_from_the_conditional():
    """One of two correlated Gaussian values is known.

    It comes back exactly. Repeated steps bring the mean and the spread of the other value near those of the
    conditional distribution. A single pass stays far from them.
    """
    rho, value, steps = 0.9, 1.5, strided_steps(1000, 60)
    cov = np.array([[1.0, rho], [rho, 1.0]])
    table, eye = jnp.asarray(COSINE.alphas_cumprod, jnp.float32), jnp.eye(2)

    def model(x, t):
        abar = table[t][:, None, None]
        return jnp.einsum(
            "bij,bj->bi", jnp.sqrt(abar) * cov @ jnp.linalg.inv(abar * cov + (1 - abar) * eye), x
        )

    denoise = make_denoiser(model, COSINE, prediction="x0")
    image, known = jnp.array([[value, 0.0]]), jnp.array([[True, False]])

    @jax.jit
    def draw(x):
        run = lambda n: repaint(
            denoise, x, COSINE, steps, jax.random.key(3), image=image, known=known, resamples=n
        )
        return run(1), run(12)

    once, often = (np.asarray(out) for out in draw(jax.random.normal(jax.random.key(4), (2000, 2))))
    for out in (once, often):
        np.testing.assert_array_equal(out[:, 0], np.float32(value))
    off = [abs(out[:, 1].mean() - rho * value) for out in (once, often)]
    assert off[1] < 0.08 < 0.25 < off[0], off
    assert abs(often[:, 1].std() / np.sqrt(1 - rho**2) - 1) < 0.15
    np.testing.assert_array_equal(
        repaint(
            denoise,
            image,
            COSINE,
            np.array([500, 200]),
            jax.random.key(0),
            image=image,
            known=known | True,
            resamples=3,
        ),
        image,
    )
    with pytest.raises(ValueError, match="resamples must be at least 1"):
        repaint(denoise, image, COSINE, steps, jax.random.key(0), image=image, known=known, resamples=0)
