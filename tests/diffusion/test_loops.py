"""Segments of a sampler, one after another, are the sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion.guidance import Denoised
from unclip_jax.diffusion.loops import Segment
from unclip_jax.diffusion.process import to_x0_eps
from unclip_jax.diffusion.samplers import SAMPLERS
from unclip_jax.diffusion.schedule import make_schedule

SCHEDULE = make_schedule("cosine", 100)
STEPS = np.arange(98, -1, -9)  # twelve steps, which three segments divide, and five do not


def denoise(x_t, t):
    """A denoiser that is not linear, so that no order of steps but the right one gives the same."""
    abar = jnp.asarray(SCHEDULE.alphas_cumprod, jnp.float32)[t]
    x0, eps = to_x0_eps(jnp.sin(3 * x_t) + 0.1 * t / 100, x_t, abar, "x0")
    return Denoised(x0, eps, None)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("count", [1, 3, 5, 20])
def test_segments_make_the_same_steps(name, count):
    """The last one's result is the sample; each one's x0 is a prediction, and they differ."""
    x, rng = jax.random.normal(jax.random.key(0), (2, 6)), jax.random.split(jax.random.key(1), 2)
    settings = {"eta": 0.7} if name == "ddim" else {}
    whole = SAMPLERS[name](denoise, x, SCHEDULE, STEPS, rng, **settings)

    @jax.jit
    def advance(k, carry):
        segment = Segment(k, count, carry)
        # What the sampler starts from is in the carry.
        noise = jnp.zeros_like(x)
        out = SAMPLERS[name](segment.watch(denoise), noise, SCHEDULE, STEPS, rng, **settings, loop=segment)
        return segment.carry, segment.x0, out

    begin = Segment(0, count)
    SAMPLERS[name](begin.watch(denoise), x, SCHEDULE, STEPS, rng, **settings, loop=begin)
    carry, shown = begin.carry, []
    for k in range(count):
        carry, x0, out = advance(k, carry)
        shown.append(np.asarray(x0))
    np.testing.assert_allclose(out, whole, atol=2e-6)
    assert begin.x0 is None and np.isfinite(shown).all()
    if count == 3:
        assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(shown, shown[1:]))
