"""Continuous time: its log-SNR, the limit of schedules of T steps, training and sampling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.cli.train import load_config, override
from unclip_jax.diffusion import losses
from unclip_jax.diffusion.guidance import abar_at, make_denoiser
from unclip_jax.diffusion.samplers import ddim, ddpm
from unclip_jax.diffusion.schedule import (
    LARGEST_LOG_SNR,
    LOG_SNRS,
    continuous_steps,
    log_snr,
    make_schedule,
    schedule_of,
)
from unclip_jax.errors import InputError
from unclip_jax.generate.denoise import diffusion_sampler
from unclip_jax.generate.options import options_from
from unclip_jax.train import imagen

MEAN, STD = np.array([0.3, -0.6, 0.0, 0.8]), np.array([0.5, 0.2, 1.0, 0.35])
COSINE = make_schedule("cosine", continuous=True)


@pytest.mark.parametrize("name", LOG_SNRS)
def test_log_snr_falls_within_its_bounds(name):
    u = np.linspace(0, 1, 5001)
    found = log_snr(name, u)
    assert found[0] == LARGEST_LOG_SNR and -LARGEST_LOG_SNR <= found[-1] < -5
    inside = np.abs(found) < LARGEST_LOG_SNR
    assert inside.sum() > 4990 and (np.diff(found[inside]) < 0).all() and (np.diff(found) <= 0).all()
    traced = np.asarray(jax.jit(functools.partial(log_snr, name, xp=jnp))(jnp.float32(u)))
    np.testing.assert_allclose(traced[1:-3], found[1:-3], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", LOG_SNRS)
def test_it_is_the_limit_of_many_steps(name):
    """The error of abar falls as 1 / T. With the cosine schedule there is none, but at the bounds."""
    u = np.linspace(0.05, 0.95, 19)
    exact = 1 / (1 + np.exp(-log_snr(name, u)))
    errors = []
    for num_steps in (1000, 10_000):
        steps = np.round(u * num_steps).astype(int) - 1
        errors.append(np.abs(make_schedule(name, num_steps).abar(steps) / exact - 1).max())
    if name == "cosine":
        assert max(errors) < 1e-9
    else:
        assert 5e-5 < errors[0] < 0.1 and errors[1] < 0.11 * errors[0]


@pytest.mark.parametrize("name", LOG_SNRS)
def test_tables_hold_the_whole_steps(name):
    schedule = make_schedule(name, 100, continuous=True)
    np.testing.assert_allclose(schedule.abar(np.arange(100)), schedule.alphas_cumprod, rtol=1e-9)
    between = schedule.abar(np.array([-1, 9, 9.25, 10]))
    assert between[0] == 1 and (np.diff(between) < 0).all()
    expected = 1 / (1 + np.exp(-log_snr(name, np.array([10, 10.25, 11]) / 100)))
    np.testing.assert_allclose(between[1:], expected, rtol=1e-9)
    np.testing.assert_array_equal(continuous_steps(100, 100), np.arange(100)[::-1])
    np.testing.assert_allclose(continuous_steps(100, 8), 12.5 * np.arange(8, 0, -1) - 1)


def test_training_draws_times_uniformly():
    """t / T covers [0, 1) evenly, the noised sample has the level of its t, and v is the target."""
    times, x0 = losses.training_times(COSINE), jnp.full((4096, 2), 0.5)
    t, eps, x_t = jax.jit(lambda rng: losses.sample_noised(rng, x0, times))(jax.random.key(0))
    u = np.sort((np.asarray(t, np.float64) + 1) / 1000)
    assert 0 <= u[0] and u[-1] < 1 and np.abs(u - (np.arange(4096) + 0.5) / 4096).max() < 0.03
    assert (np.asarray(t) % 1 != 0).mean() > 0.9
    abar = COSINE.abar(np.asarray(t, np.float64))[:, None]
    np.testing.assert_allclose(x_t, np.sqrt(abar) * 0.5 + np.sqrt(1 - abar) * eps, atol=1e-4)
    v = np.sqrt(abar) * eps - np.sqrt(1 - abar) * 0.5
    diffusion = {"prediction": "v", "vb_weight": 0.0, "num_steps": 1000}
    loss, _ = losses.hybrid_loss(jnp.asarray(v), None, x0, eps, x_t, t, times, diffusion)
    assert loss < 1e-6
    assert losses.hybrid_loss(jnp.asarray(v + 1), None, x0, eps, x_t, t, times, diffusion)[0] > 0.9


def perfect(schedule):
    """The denoiser of a Gaussian, by v, for steps that may lie between whole ones."""

    def model(x, t):
        abar = abar_at(schedule, t)[:, None]
        a, s, total = jnp.sqrt(abar), jnp.sqrt(1 - abar), abar * STD**2 + 1 - abar
        x0, eps = MEAN + a * STD**2 / total * (x - a * MEAN), s / total * (x - a * MEAN)
        return a * eps - s * x0

    return make_denoiser(model, schedule, prediction="v")


def test_sampling_with_all_steps_equals_the_discrete_schedule():
    x = jax.random.normal(jax.random.key(0), (64, 4))
    whole, steps = np.arange(1000)[::-1], continuous_steps(1000, 1000)
    discrete = make_schedule("cosine")
    first = ddim(perfect(discrete), x, discrete, whole)
    np.testing.assert_allclose(ddim(perfect(COSINE), x, COSINE, steps), first, atol=2e-3)


def test_samples_have_the_moments_of_the_data():
    """With steps between the whole ones, and noise at each step."""
    x, steps = jax.random.normal(jax.random.key(0), (5000, 4)), continuous_steps(1000, 170)
    assert (steps % 1 != 0).any()
    out = np.asarray(ddpm(perfect(COSINE), x, COSINE, steps, jax.random.key(1), variance="large"))
    np.testing.assert_array_less(np.abs(out.mean(0) - MEAN), 4 * STD / 5000**0.5 + 0.005 * STD)
    np.testing.assert_array_less(np.abs(out.var(0) / STD**2 - 1), 4 * (2 / 5000) ** 0.5 + 0.02)


def test_imagen_samples_between_whole_steps():
    config = load_config("configs/imagen/imagen.py:tiny")
    options = options_from(dict(config.sampling) | {"steps": 3}, "imagen")
    part = {"kind": "imagen", "diffusion": dict(config.diffusion)}
    np.testing.assert_allclose(diffusion_sampler(part, options).steps, [999, 1997 / 3, 997 / 3])
    part["diffusion"]["continuous"] = False
    np.testing.assert_array_equal(diffusion_sampler(part, options).steps, [999, 500, 0])


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"zero_snr": True}, "neither beta_ends nor zero_snr"),
        ({"beta_ends": (1e-4, 0.02)}, "neither beta_ends nor zero_snr"),
        ({"num_steps": 20_000}, "from 2 to 10000"),
    ],
)
def test_what_continuous_time_refuses(settings, words):
    with pytest.raises(InputError, match=words):
        schedule_of({"schedule": "linear", "num_steps": 1000, "continuous": True} | settings)


def test_no_variance_is_learned():
    config = load_config("configs/imagen/imagen.py:tiny")
    override(config, "model.unet.out_channels", 6)
    with pytest.raises(InputError, match="in continuous time no variance is learned"):
        imagen.check(config)
