"""Noising, conversions and posteriors, against independent derivations in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion import process
from unclip_jax.diffusion.schedule import make_schedule

SCHEDULE = make_schedule("cosine")


@pytest.fixture(scope="module")
def sample():
    """x0, eps (5, 3, 2) and abar (5,) over the whole range, float64."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(5, 3, 2)), rng.normal(size=(5, 3, 2)), np.array([0.9999, 0.9, 0.5, 0.05, 1e-3])


def as_kind(kind, x0, eps, abar):
    """The prediction of a perfect model of this kind."""
    return {"x0": x0, "eps": eps, "v": process.velocity(x0, eps, abar)}[kind]


@pytest.mark.parametrize("kind, other", itertools.product(process.PREDICTIONS, repeat=2))
def test_conversion_cycles(sample, kind, other):
    """x0, eps -> one kind -> x0, eps -> another kind -> x0, eps is the identity, to 1e-10."""
    with jax.enable_x64(True):
        x0, eps, abar = (jnp.asarray(a) for a in sample)
        x_t = process.add_noise(x0, eps, abar)
        once = process.to_x0_eps(as_kind(kind, x0, eps, abar), x_t, abar, kind)
        twice = process.to_x0_eps(as_kind(other, *once, abar), x_t, abar, other)
        assert twice[0].dtype == jnp.float64
        np.testing.assert_allclose(twice[0], x0, atol=1e-10)
        np.testing.assert_allclose(twice[1], eps, atol=1e-10)
        np.testing.assert_allclose(process.eps_from_x0(twice[0], x_t, abar), eps, atol=1e-10)


def test_forward_process_and_velocity_by_hand(sample):
    """One number each: x_t and v are a rotation of (x0, eps) by arccos sqrt(abar)."""
    with jax.enable_x64(True):
        x0, eps, abar = sample
        angle = np.arccos(np.sqrt(abar))[:, None, None]
        np.testing.assert_allclose(
            process.add_noise(x0, eps, abar), np.cos(angle) * x0 + np.sin(angle) * eps, rtol=1e-12
        )
        np.testing.assert_allclose(
            process.velocity(x0, eps, abar), np.cos(angle) * eps - np.sin(angle) * x0, rtol=1e-12
        )


def test_scalar_abar_equals_one_per_row(sample):
    """A scalar coefficient equals the same coefficient given for every row."""
    x0, eps, _ = sample
    np.testing.assert_allclose(
        process.add_noise(x0, eps, 0.3), process.add_noise(x0, eps, jnp.full(5, 0.3)), rtol=1e-6
    )


def test_unknown_prediction(sample):
    """The message lists the choices."""
    with pytest.raises(ValueError, match="'score'.*eps, x0, v"):
        process.to_x0_eps(sample[0], sample[1], 0.5, "score")


@pytest.mark.parametrize(
    "t, r", [(1, 0), (999, 998), (999, 0), (500, 250), (832, 666), (40, 39), (0, -1), (500, -1), (999, -1)]
)
def test_posterior_is_bayes_rule(t, r):
    """q(x_r | x_t, x0) is proportional to q(x_t | x_r) q(x_r | x0).

    The test integrates on a grid of x_r instead of solving for it.
    """
    abar_t, abar_r = SCHEDULE.alphas_cumprod[t], SCHEDULE.alphas_cumprod[r] if r >= 0 else 1.0
    x0, x_t = 0.3, -0.4
    post = process.posterior(SCHEDULE, np.array([t]), np.array([r]))
    mean = post.x0_coef[0] * x0 + post.x_t_coef[0] * x_t
    if r < 0:
        assert mean == x0 and post.variance[0] == 0
        return
    std = np.sqrt(post.variance[0])
    x_r = mean + std * np.linspace(-12, 12, 200_001)
    ratio = abar_t / abar_r
    log_joint = -((x_t - np.sqrt(ratio) * x_r) ** 2) / (2 * (1 - ratio)) - (
        x_r - np.sqrt(abar_r) * x0
    ) ** 2 / (2 * (1 - abar_r))
    density = np.exp(log_joint - log_joint.max())
    density /= density.sum()
    true_mean = np.sum(density * x_r)
    np.testing.assert_allclose(mean, true_mean, atol=1e-9)
    np.testing.assert_allclose(post.variance[0], np.sum(density * (x_r - true_mean) ** 2), rtol=1e-8)
    np.testing.assert_allclose(post.log_variance_large[0], np.log(1 - ratio), rtol=1e-12)


def test_single_steps_are_ddpm():
    """Ho et al. 2020, eq. 7, computed from the betas."""
    t = np.arange(1, 1000)
    betas, abar = SCHEDULE.betas[1:], SCHEDULE.alphas_cumprod
    post = process.posterior(SCHEDULE, t, t - 1)
    np.testing.assert_allclose(post.x0_coef, np.sqrt(abar[:-1]) * betas / (1 - abar[1:]), rtol=1e-9)
    np.testing.assert_allclose(
        post.x_t_coef, np.sqrt(1 - betas) * (1 - abar[:-1]) / (1 - abar[1:]), rtol=1e-9
    )
    np.testing.assert_allclose(post.variance, (1 - abar[:-1]) / (1 - abar[1:]) * betas, rtol=1e-9)
    np.testing.assert_allclose(post.log_variance_small, np.log(post.variance), rtol=1e-12)
    np.testing.assert_allclose(post.log_variance_large, np.log(betas), rtol=1e-9)


def test_posterior_is_elementwise_and_its_logarithm_finite():
    """An entry does not depend on the others.

    The step to the clean sample takes the log variance of the step 1 -> 0.
    """
    t, r = np.array([0, 700, 400]), np.array([-1, 600, -1])
    together = process.posterior(SCHEDULE, t, r)
    for i in range(3):
        for a, b in zip(together, process.posterior(SCHEDULE, t[i], r[i])):
            assert a[i] == b
    assert together.log_variance_small[0] == process.posterior(SCHEDULE, 1, 0).log_variance_small
    with pytest.raises(ValueError, match="earlier"):
        process.posterior(SCHEDULE, np.array([5, 3]), np.array([4, 3]))


def test_learned_range_limits():
    """v = 0 is the posterior's variance, v = 1 the forward step's, v = 1/2 their geometric mean."""
    small, large = jnp.array([-9.0, -3.0]), jnp.array([-8.0, -1.0])
    v = jnp.ones((2, 4))
    np.testing.assert_allclose(process.learned_log_variance(0 * v, small, large), small[:, None] * v)
    np.testing.assert_allclose(process.learned_log_variance(v, small, large), large[:, None] * v)
    np.testing.assert_allclose(
        process.learned_log_variance(0.5 * v, small, large), jnp.array([[-8.5], [-2.0]]) * v
    )


def test_noise_by_row_keys_is_the_rows_own():
    """A row's noise depends on its key alone; different keys and different folds give different noise."""
    keys = jax.random.split(jax.random.key(0), 4)
    noise = process.standard_normal(process.fold_in(keys, 7), (4, 1000))
    np.testing.assert_array_equal(
        noise[2:3], process.standard_normal(process.fold_in(keys[2:3], 7), (1, 1000))
    )
    assert np.abs(np.corrcoef(noise) - np.eye(4)).max() < 0.15
    assert not np.allclose(noise, process.standard_normal(process.fold_in(keys, 8), (4, 1000)))
