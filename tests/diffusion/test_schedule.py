"""Published schedule values; the choice of steps."""

import numpy as np
import pytest

from unclip_jax.diffusion.schedule import SCHEDULES, make_schedule, strided_steps

ANCHORS = {  # abar at 0, 499, 999 of T = 1000
    "cosine": (0.99995872, 0.49384359, 2.428767e-9),
    "linear": (0.99990000, 0.07858724, 4.035830e-5),
    "scaled_linear": (0.99915000, 0.27766965, 4.660099e-3),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_published_values(name):
    """abar agrees with the published tables in every printed digit."""
    abar = make_schedule(name).alphas_cumprod
    assert abar.dtype == np.float64 and abar.shape == (1000,)
    np.testing.assert_allclose(abar[[0, 499, 999]], ANCHORS[name], rtol=2e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_another_length_ends_in_noise_too(name):
    """The noise only grows, and its end depends on T little: it is a rescaled schedule, not a truncated one."""
    full, short = make_schedule(name).alphas_cumprod, make_schedule(name, 250).alphas_cumprod
    assert np.all(np.diff(short) < 0)
    assert short[-1] < 1.2 * full[-1] + 1e-7
    np.testing.assert_allclose(short[124], full[499], rtol=0.02)


def test_abar_of_the_clean_sample_is_one():
    """Step -1 stands for the clean sample."""
    schedule = make_schedule("cosine")
    np.testing.assert_array_equal(schedule.abar(np.array([-1, 0, 999])), [1.0, *schedule.alphas_cumprod[[0, 999]]])
    assert schedule.abar(-1) == 1.0


def test_unknown_and_impossible_schedules():
    """The message names what is wrong."""
    with pytest.raises(ValueError, match="sqrt.*cosine, linear, scaled_linear"):
        make_schedule("sqrt")
    with pytest.raises(ValueError, match="no valid betas with 10 steps"):
        make_schedule("linear", 10)


def test_strided_steps_are_strict_and_reach_both_ends():
    """Every count from 2 to T: as many distinct descending steps, the first T - 1, the last 0."""
    for count in range(2, 1001):
        steps = strided_steps(1000, count)
        assert len(steps) == count and steps[0] == 999 and steps[-1] == 0
        assert np.all(np.diff(steps) < 0)
    np.testing.assert_array_equal(strided_steps(1000, 1), [999])
    np.testing.assert_array_equal(strided_steps(1000, 1000), np.arange(1000)[::-1])


def test_strided_steps_published():
    """Seven and twenty-five steps of the public upsampler and prior."""
    np.testing.assert_array_equal(strided_steps(1000, 7), [999, 832, 666, 500, 333, 166, 0])
    np.testing.assert_array_equal(strided_steps(1000, 25)[[0, 1, 2, -2, -1]], [999, 957, 916, 42, 0])


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_strided_steps_out_of_range(count):
    """Neither none nor more than there are."""
    with pytest.raises(ValueError, match=f"between 1 and 1000, got {count}"):
        strided_steps(1000, count)
