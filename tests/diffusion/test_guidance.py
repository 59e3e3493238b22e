"""Guidance: limits of the scale, the source of the variance, and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion.guidance import (
    GUIDANCE_SCHEDULES,
    Guidance,
    dynamic_threshold,
    guide,
    make_denoiser,
    rescaled,
)
from unclip_jax.diffusion.process import PREDICTIONS, add_noise, velocity
from unclip_jax.diffusion.schedule import make_schedule

SCHEDULE = make_schedule("cosine")
B, C = 3, 2
T = 400


def output(x, t, sign):
    """An artificial network with learned variance.

    `sign` (N,) is +1 on conditional rows and -1 on unconditional ones.
    """
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
    """Scale 1 is the conditional model and scale 0 the unconditional one.

    The variance is the conditional one's in both cases.
    """
    guided = make_denoiser(both, SCHEDULE, prediction=prediction, guidance=Guidance(scale))(x_t, jnp.array(T))
    plain = make_denoiser(half, SCHEDULE, prediction=prediction)(x_t, jnp.array(T))
    np.testing.assert_allclose(guided.x0, plain.x0, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(guided.eps, plain.eps, rtol=1e-4, atol=1e-5)
    expected = make_denoiser(conditional, SCHEDULE, prediction=prediction)(x_t, jnp.array(T)).v_frac
    np.testing.assert_allclose(guided.v_frac, expected, rtol=1e-6)
    assert not np.allclose(
        plain.x0,
        make_denoiser(lambda x, t: -half(x, t), SCHEDULE, prediction=prediction)(x_t, jnp.array(T)).x0,
    )


def test_guidance_extrapolates_the_prediction(x_t):
    """Scale 3 is uncond + 3 (cond - uncond) in the model's own parameterisation."""
    out = make_denoiser(both, SCHEDULE, prediction="eps", guidance=Guidance(3.0))(x_t, jnp.array(T))
    t = jnp.full((B,), T)
    cond, uncond = conditional(x_t, t)[:, :C], unconditional(x_t, t)[:, :C]
    np.testing.assert_allclose(out.eps, 3 * cond - 2 * uncond, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(guide(2.0, 1.0, 4.0), 5.0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clip_recomputes_eps(x_t, prediction):
    """Clipping bounds x0 and recomputes an eps that leads to x_t.

    It leaves entries inside the bound unchanged.
    """
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
    """The denoiser reads abar at the requested step."""
    x0, eps = jax.random.normal(jax.random.key(1), (2, B, C))
    for t in (0, 37, 900):
        abar = SCHEDULE.alphas_cumprod[t]
        target = {"x0": x0, "eps": eps, "v": velocity(x0, eps, abar)}[prediction]
        out = make_denoiser(lambda x, t, target=target: target, SCHEDULE, prediction=prediction)(
            add_noise(x0, eps, abar), jnp.array(t)
        )
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


@pytest.mark.parametrize("name", GUIDANCE_SCHEDULES)
def test_scale_over_time(name):
    """Every schedule leaves scale 1 unchanged and stays between 1 and the scale.

    It reaches the scale at the clean end. All schedules except the constant one start at 1.
    """
    u = jnp.linspace(0, 1, 11)
    scale = Guidance(4.0, name).at(u)
    assert (
        np.all(np.asarray(scale) >= 1 - 1e-6)
        and np.all(np.asarray(scale) <= 4 + 1e-6)
        and float(scale[0]) == 4.0
    )
    assert np.all(np.diff(scale) <= 1e-6)
    np.testing.assert_allclose(scale[-1], 4.0 if name == "constant" else 1.0, atol=1e-6)
    np.testing.assert_array_equal(Guidance(1.0, name).at(u), np.ones(11))


def test_guidance_interval(x_t):
    """Inside the interval the prediction is guided, outside it is the conditional one."""
    guidance = Guidance(3.0, interval=(0.3, 0.5))
    for t, other in ((400, Guidance(3.0)), (600, Guidance(1.0)), (200, Guidance(1.0))):
        ours, theirs = (
            make_denoiser(both, SCHEDULE, prediction="eps", guidance=g)(x_t, jnp.array(t))
            for g in (guidance, other)
        )
        np.testing.assert_allclose(ours.eps, theirs.eps, rtol=1e-6)


def test_rescale():
    """phi 1 gives the conditional standard deviation and phi 0 changes nothing.

    The direction of every row stays the same.
    """
    cond, guided = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2)) * jnp.array([1.0, 5.0]).reshape(
        2, 1, 1, 1, 1
    )
    np.testing.assert_allclose(
        np.std(rescaled(guided, cond, 1.0), (1, 2, 3)), np.std(cond, (1, 2, 3)), rtol=1e-4
    )
    np.testing.assert_array_equal(rescaled(guided, cond, 0.0), guided)
    ratio = rescaled(guided, cond, 0.7) / guided
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1, :1, :1], ratio.shape), rtol=1e-4)
    t = jnp.array(T)
    x = jax.random.normal(jax.random.key(2), (B, C))
    plain, pulled = (
        make_denoiser(both, SCHEDULE, prediction="eps", guidance=Guidance(3.0, rescale=r))(x, t).eps
        for r in (0.0, 1.0)
    )
    np.testing.assert_allclose(
        np.std(pulled, 1), np.std(conditional(x, jnp.full((B,), T))[:, :C], 1), rtol=1e-4
    )
    assert not np.allclose(plain, pulled, rtol=1e-2)


def test_dynamic_threshold(x_t):
    """A row inside the bound is unchanged.

    Another row is clipped at its percentile and divided by it.
    """
    x0 = jnp.stack([jnp.linspace(-0.9, 0.9, 101), jnp.linspace(-4.0, 4.0, 101)])
    out = dynamic_threshold(x0, 50.0, 1.0)
    np.testing.assert_array_equal(out[0], x0[0])
    np.testing.assert_allclose(out[1], np.clip(x0[1] / 2.0, -1, 1), atol=1e-6)
    denoised = make_denoiser(conditional, SCHEDULE, prediction="eps", clip=0.5, threshold=90.0)(
        x_t, jnp.array(T)
    )
    assert np.abs(denoised.x0).max() <= 0.5 + 1e-6
    np.testing.assert_allclose(
        add_noise(denoised.x0, denoised.eps, SCHEDULE.alphas_cumprod[T]), x_t, atol=1e-5
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"guidance": Guidance(2.0, "steep")},
            "unknown guidance schedule 'steep'; choose one of constant, linear, cosine",
        ),
        ({"guidance": Guidance(2.0, interval=(0.5, 0.5))}, "0 <= low < high <= 1"),
        ({"guidance": Guidance(2.0, rescale=1.5)}, r"rescale must be in \[0, 1\], got 1.5"),
        ({"threshold": 99.5}, "needs a clip"),
        ({"threshold": 0.0, "clip": 1.0}, "percentile in"),
    ],
)
def test_settings_out_of_range(settings, message):
    """The error comes when the denoiser is made, not during sampling."""
    with pytest.raises(ValueError, match=message):
        make_denoiser(both, SCHEDULE, prediction="eps", **settings)
