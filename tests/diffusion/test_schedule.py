"""Published schedule values, and the choice of steps."""

import numpy as np
import pytest

from unclip_jax.diffusion.schedule import (
    NAMED_STEPS,
    SCHEDULES,
    make_schedule,
    segment_steps,
    strided_steps,
    time_steps,
)

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
    """The noise only grows, and its final level hardly depends on T.

    So the schedule is rescaled, not truncated.
    """
    full, short = make_schedule(name).alphas_cumprod, make_schedule(name, 250).alphas_cumprod
    assert np.all(np.diff(short) < 0)
    assert short[-1] < 1.2 * full[-1] + 1e-7
    np.testing.assert_allclose(short[124], full[499], rtol=0.02)


def test_abar_of_the_clean_sample_is_one():
    """Step -1 stands for the clean sample."""
    schedule = make_schedule("cosine")
    np.testing.assert_array_equal(
        schedule.abar(np.array([-1, 0, 999])), [1.0, *schedule.alphas_cumprod[[0, 999]]]
    )
    assert schedule.abar(-1) == 1.0


def test_unknown_and_impossible_schedules():
    """The message names the cause."""
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
    """A count below 1 or above T is an error."""
    with pytest.raises(ValueError, match=f"between 1 and 1000, got {count}"):
        strided_steps(1000, count)


def test_segments():
    """One segment is the plain stride, and uneven divisions cover everything.

    GLIDE's list differs from its segments only in the noisiest step.
    """
    np.testing.assert_array_equal(segment_steps(1000, [64]), strided_steps(1000, 64))
    np.testing.assert_array_equal(segment_steps(10, [4, 3, 3]), np.arange(10)[::-1])
    np.testing.assert_array_equal(segment_steps(12, [1, 2, 1]), [8, 7, 4, 0])
    segments, listed = time_steps(1000, "10,10,3,2,2"), time_steps(1000, "fast27")
    assert len(segments) == len(listed) == 27 and (segments[0], listed[0]) == (999, 997)
    np.testing.assert_array_equal(segments[1:], listed[1:])


@pytest.mark.parametrize(
    "steps", [1, 7, "7", "10,10,3,2,2", "ddim50", "ddim8", *NAMED_STEPS, (999, 500, 0), [3, 5, 900]]
)
def test_every_way_to_say_steps(steps):
    """Strictly descending and in range."""
    t = time_steps(1000, steps)
    assert np.all(np.diff(t) < 0) and t[0] <= 999 and t[-1] >= 0


def test_ways_to_say_steps():
    """A number, also as text, is a fractional stride; ddimN is an integer stride.

    A sequence is itself, in descending order.
    """
    np.testing.assert_array_equal(time_steps(1000, "50"), strided_steps(1000, 50))
    np.testing.assert_array_equal(time_steps(1000, 50), strided_steps(1000, 50))
    np.testing.assert_array_equal(time_steps(1000, "ddim50"), np.arange(0, 1000, 20)[::-1])
    np.testing.assert_array_equal(time_steps(1000, (0, 7, 3)), [7, 3, 0])


@pytest.mark.parametrize(
    "steps, message",
    [
        (0, "between 1 and 100, got 0"),
        (2.5, "whole number, text or a list, got 2.5"),
        ("many", "'many': give a number, segments"),
        ("ddim97", "no integer stride takes 97 of 100"),
        ("fast27", "made for 1000 steps, not 100"),
        ("60,2", "segment 1 of 2 has 50 steps; cannot take 60"),
        ("0,2", "cannot take 0"),
        ((), "at least one"),
        ((5, 5), "distinct"),
        ((100, 3), "between 0 and 99"),
        ((-1, 3), "between 0 and 99"),
    ],
)
def test_steps_that_cannot_be(steps, message):
    """The message names the number and the range."""
    with pytest.raises(ValueError, match=message):
        time_steps(100, steps)
