"""Losses: zero at the target, probabilities that sum to one, and finite gradients only where intended."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion import losses
from unclip_jax.diffusion.process import PREDICTIONS, add_noise, posterior, velocity
from unclip_jax.diffusion.schedule import make_schedule

SCHEDULE = make_schedule("cosine")
TABLES = losses.training_tables(SCHEDULE)
T = np.array([0, 1, 10, 300, 700, 990, 998, 999])


@pytest.fixture(scope="module")
def batch():
    """x0 on the 8-bit grid, eps, x_t (8, 4, 4, 3) and t (8,), both ends included."""
    rng = np.random.default_rng(0)
    x0 = (rng.integers(0, 256, (8, 4, 4, 3)) / 127.5 - 1).astype(np.float32)
    eps = rng.normal(size=x0.shape).astype(np.float32)
    t = jnp.asarray(T)
    return x0, eps, add_noise(x0, eps, jnp.asarray(TABLES.alphas_cumprod)[t]), t


nll_of = jax.jit(losses.discretised_nll)


@pytest.fixture(scope="module")
def bits():
    """(value, gradients with respect to prediction and v_frac) of the summed bound.

    It is compiled once per kind.
    """

    def value(prediction, v_frac, x0, x_t, t, kind):
        per_row = losses.variational_bits(prediction, v_frac, x0, x_t, t, TABLES, kind)
        return jnp.sum(per_row), per_row

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True), static_argnames="kind")


def target(kind, x0, eps, t):
    return {"x0": x0, "eps": eps, "v": velocity(x0, eps, jnp.asarray(TABLES.alphas_cumprod)[t])}[kind]


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_simple_loss_is_zero_at_the_target_and_one_at_distance_one(batch, kind):
    """Each kind has its own target, and the loss is a mean over the sample."""
    x0, eps, _, t = batch
    truth = target(kind, x0, eps, t)
    np.testing.assert_allclose(losses.simple_loss(truth, x0, eps, t, TABLES, kind), 0, atol=1e-10)
    np.testing.assert_allclose(losses.simple_loss(truth + 1, x0, eps, t, TABLES, kind), 1, rtol=1e-5)
    for other in set(PREDICTIONS) - {kind}:
        assert losses.simple_loss(truth, x0, eps, t, TABLES, other)[3] > 0.1
    with pytest.raises(ValueError, match="'score'"):
        losses.simple_loss(truth, x0, eps, t, TABLES, "score")


def test_sample_noised_is_uniform_in_time_and_matches_the_process():
    """Every step of a short schedule is drawn equally often; x_t comes from the returned eps and t."""
    tables = losses.training_tables(make_schedule("cosine", 20))
    x0 = jnp.ones((20_000, 2))
    t, eps, x_t = losses.sample_noised(jax.random.key(0), x0, tables)
    counts = np.bincount(t, minlength=20)
    assert len(counts) == 20 and np.all(np.abs(counts - 1000) < 5 * np.sqrt(1000))
    assert abs(np.mean(eps)) < 0.03 and abs(np.std(eps) - 1) < 0.03
    np.testing.assert_allclose(x_t, add_noise(x0, eps, jnp.asarray(tables.alphas_cumprod)[t]))


def test_normal_kl_against_numerical_integration():
    """Zero at equality; elsewhere the integral of p (log p - log q)."""
    assert losses.normal_kl(0.3, -1.2, 0.3, -1.2) == 0
    x = np.linspace(-30, 30, 400_001)
    log_normal = lambda mean, log_var: (
        -0.5 * (np.log(2 * np.pi) + log_var + (x - mean) ** 2 * np.exp(-log_var))
    )
    for m1, v1, m2, v2 in [(0.0, 0.0, 1.0, 0.5), (-2.0, 1.0, 1.0, -0.5), (0.5, -3.0, 0.4, -2.0)]:
        log_p, log_q = log_normal(m1, v1), log_normal(m2, v2)
        expected = np.sum(np.exp(log_p) * (log_p - log_q)) * (x[1] - x[0])
        np.testing.assert_allclose(losses.normal_kl(m1, v1, m2, v2), expected, rtol=1e-4)


@pytest.mark.parametrize(
    "mean, log_var", [(0.0, 0.0), (0.0, -9.0), (0.4, -11.0), (-1.0, -3.0), (3.0, -2.0), (0.1, 4.0)]
)
def test_discretised_probabilities_sum_to_one(mean, log_var):
    """The sum runs over all 256 values, wherever the Gaussian is.

    A wide bin has the probability that the normal CDF gives it.
    """
    values = jnp.arange(256) / 127.5 - 1
    nll = nll_of(values, mean, log_var)
    np.testing.assert_allclose(np.sum(np.exp(-nll)), 1, atol=2e-3)
    cdf = lambda z: 0.5 * math.erfc(-z * math.exp(-log_var / 2) / math.sqrt(2))
    k = int(np.clip(round((mean + 1) * 127.5), 1, 254))
    direct = cdf(float(values[k]) + 1 / 255 - mean) - cdf(float(values[k]) - 1 / 255 - mean)
    if direct > 1e-3:
        np.testing.assert_allclose(np.exp(-nll[k]), direct, rtol=2e-3)


def test_discretised_nll_is_finite_at_extreme_means():
    """Value and gradients are finite with means hundreds of thousands of deviations away."""
    x = jnp.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    gradient = jax.jit(
        jax.vmap(jax.value_and_grad(losses.discretised_nll, argnums=(1, 2)), in_axes=(0, None, None))
    )
    for mean in (-1000.0, -3.0, -1.0, 0.0, 1.0, 3.0, 1000.0):
        for log_var in (-14.0, -9.0, 0.0, 4.0):
            value, (by_mean, by_log_var) = gradient(x, mean, log_var)
            assert np.all(np.isfinite(value)) and np.all(value >= 0)
            assert np.all(np.isfinite(by_mean)) and np.all(np.isfinite(by_log_var))
    value, (by_mean, _) = gradient(x, -1000.0, -9.0)
    assert np.all(value[1:] > 1e6) and np.all(by_mean[1:] < 0)  # a gradient that leads back


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_variational_bits_learns_the_variance_alone(batch, bits, kind):
    """The prediction gets no gradient; every element of the variance fraction gets one.

    All gradients are finite at both ends of the schedule.
    """
    x0, eps, x_t, t = batch
    prediction = target(kind, x0, eps, t) + 0.3
    (_, per_row), (by_prediction, by_fraction) = bits(prediction, jnp.full(x0.shape, 0.4), x0, x_t, t, kind)
    np.testing.assert_array_equal(by_prediction, 0)
    assert np.all(np.isfinite(per_row)) and np.all(np.isfinite(by_fraction))
    (_, perfect), _ = bits(target(kind, x0, eps, t), jnp.zeros(x0.shape), x0, x_t, t, kind)
    np.testing.assert_allclose(perfect[1:6], 0, atol=2e-3)
    # At the noisy end the forward and the posterior variance meet, and the fraction stops mattering.
    assert np.all(np.asarray(by_fraction)[:5] != 0)


def test_variational_bits_is_finite_at_every_step(bits):
    """All 1000 steps, for a good, a useless and an extreme prediction, in float32."""
    t = jnp.arange(1000)
    x0 = jnp.tile(jnp.array([-1.0, 0.2, 1.0]), (1000, 1))
    eps = jax.random.normal(jax.random.key(0), x0.shape)
    x_t = add_noise(x0, eps, jnp.asarray(TABLES.alphas_cumprod))
    for prediction in (eps, 0 * eps, 100 * eps):
        for v_frac in (-0.5, 0.0, 1.0, 1.5):
            (_, per_row), (_, by_fraction) = bits(prediction, jnp.full(x0.shape, v_frac), x0, x_t, t, "eps")
            assert np.all(np.isfinite(per_row)) and np.all(np.isfinite(by_fraction))


def test_variational_bits_values(batch, bits):
    """For t > 0 a perfect mean with the posterior's variance costs nothing.

    A wider variance costs the KL divergence of two normals. At t = 0 the value is the likelihood of the 8-bit
    image.
    """
    x0, eps, x_t, t = batch
    (_, exact), _ = bits(eps, jnp.zeros(x0.shape), x0, x_t, t, "eps")
    np.testing.assert_allclose(exact[1:6], 0, atol=2e-3)
    (_, wide), _ = bits(eps, jnp.ones(x0.shape), x0, x_t, t, "eps")
    post = posterior(SCHEDULE, T, T - 1)
    gap = post.log_variance_large - post.log_variance_small
    np.testing.assert_allclose(wide[1:5], (0.5 * (gap - 1 + np.exp(-gap)) / np.log(2))[1:5], atol=2e-3)
    nll = nll_of(x0[0], x0[0], post.log_variance_small[0])
    np.testing.assert_allclose(exact[0], np.mean(nll) / np.log(2), rtol=1e-2)


def test_split_variance():
    """The last axis is split in half, or there is nothing to split."""
    output = jnp.arange(12.0).reshape(2, 6)
    prediction, fraction = losses.split_variance(output, 3)
    np.testing.assert_array_equal(prediction, output[:, :3])
    np.testing.assert_array_equal(fraction, (output[:, 3:] + 1) / 2)
    assert losses.split_variance(output, 6)[1] is None
    with pytest.raises(ValueError, match="6 channels; expected 4"):
        losses.split_variance(output, 4)
