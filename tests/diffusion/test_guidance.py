"""Guidance limits, where the variance comes from, and the clip's consistency."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion.guidance import guide, make_denoiser
from unclip_jax.diffusion.process import PREDICTIONS, add_noise, velocity
from unclip_jax.diffusion.schedule import make_schedule

SCHEDULE = make_schedule("cosine")
B, C = 3, 2
T = 400


def output(x, t, sign):
    """A made-up network with learned variance; `sign` (N,) tells the conditional (+1) from the unconditional (-1) rows."""
    sign = sign[:, None]
    prediction = jnp.sin(x + 0.01 * t[:, None]) * (1 + 0.5 * sign)
    return jnp.concatenate([prediction, 0.3 * sign + 0.1 * x], axis=-1)


def conditional(x, t):
    return output(x, t, jnp.ones(len(x)))


def unconditional(x, t):
    return output(x, t, -jnp.ones(len(x)))


def both(x, t):
    return output(x, t, jnp.where(jnp.arange(len(x)) < len(x) // 2, 1.0, -1.0))


@pytest.fixture(scope="module")
def x_t():
    return jax.random.normal(jax.random.key(0), (B, C))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("scale, half", [(1.0, conditional), (0.0, unconditional)])
def test_limits_of_the_scale(x_t, prediction, scale, half):
    """Scale 1 is the conditional model, scale 0 the unconditional one; the variance is the conditional one's in both cases."""
    guided = make_denoiser(both, SCHEDULE, prediction=prediction, guidance_scale=scale)(x_t, jnp.array(T))
    plain = make_denoiser(half, SCHEDULE, prediction=prediction)(x_t, jnp.array(T))
    np.testing.assert_allclose(guided.x0, plain.x0, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(guided.eps, plain.eps, rtol=1e-4, atol=1e-5)
    expected = make_denoiser(conditional, SCHEDULE, prediction=prediction)(x_t, jnp.array(T)).v_frac
    np.testing.assert_allclose(guided.v_frac, expected, rtol=1e-6)
    assert not np.allclose(plain.x0, make_denoiser(lambda x, t: -half(x, t), SCHEDULE, prediction=prediction)(x_t, jnp.array(T)).x0)


def test_guidance_extrapolates_the_prediction(x_t):
    """Scale 3 is uncond + 3 (cond - uncond) in the model's own parameterisation."""
    out = make_denoiser(both, SCHEDULE, prediction="eps", guidance_scale=3.0)(x_t, jnp.array(T))
    t = jnp.full((B,), T)
    cond, uncond = conditional(x_t, t)[:, :C], unconditional(x_t, t)[:, :C]
    np.testing.assert_allclose(out.eps, 3 * cond - 2 * uncond, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(guide(2.0, 1.0, 4.0), 5.0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clip_recomputes_eps(x_t, prediction):
    """After clipping, x0 is bounded, still leads to x_t with its eps, and entries that were inside are untouched."""
    abar = SCHEDULE.alphas_cumprod[T]
    free = make_denoiser(conditional, SCHEDULE, prediction=prediction)(x_t, jnp.array(T))
    clipped = make_denoiser(conditional, SCHEDULE, prediction=prediction, clip=0.5)(x_t, jnp.array(T))
    inside = np.abs(free.x0) < 0.5
    assert 0 < inside.sum() < inside.size
    np.testing.assert_array_equal(clipped.x0, np.clip(free.x0, -0.5, 0.5))
    np.testing.assert_allclose(add_noise(clipped.x0, clipped.eps, abar), x_t, atol=1e-5)
    np.testing.assert_allclose(np.asarray(clipped.eps)[inside], np.asarray(free.eps)[inside], atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_model_gives_back_x0_and_eps(prediction):
    """The denoiser reads abar at the step it is asked about."""
    x0, eps = jax.random.normal(jax.random.key(1), (2, B, C))
    for t in (0, 37, 900):
        abar = SCHEDULE.alphas_cumprod[t]
        target = {"x0": x0, "eps": eps, "v": velocity(x0, eps, abar)}[prediction]
        out = make_denoiser(lambda x, t, target=target: target, SCHEDULE, prediction=prediction)(add_noise(x0, eps, abar), jnp.array(t))
        np.testing.assert_allclose(out.x0, x0, atol=2e-4)
        np.testing.assert_allclose(out.eps, eps, atol=2e-3)
        assert out.v_frac is None


def test_fraction_is_the_output_mapped_to_the_unit_range(x_t):
    """(output + 1) / 2; an odd number of channels is an error."""
    raw = conditional(x_t, jnp.full((B,), T))[:, C:]
    out = make_denoiser(conditional, SCHEDULE, prediction="eps")(x_t, jnp.array(T))
    np.testing.assert_allclose(out.v_frac, (raw + 1) / 2, rtol=1e-6)
    with pytest.raises(ValueError, match="3 channels; expected 2, or 4"):
        make_denoiser(lambda x, t: conditional(x, t)[:, :3], SCHEDULE, prediction="eps")(x_t, jnp.array(T))
