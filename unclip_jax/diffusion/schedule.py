"""Noise schedules as float64 tables, and the choice of time steps.

A schedule is a list of betas b_0..b_{T-1}; abar_t = prod_{i<=t} (1 - b_i), and x_t = sqrt(abar_t) x0 + sqrt(1
- abar_t) eps.

cosine        f(u) = cos^2((u + 0.008) / 1.008 * pi/2), b_i = 1 - f((i+1)/T) / f(i/T), at most 0.999
              (Nichol and Dhariwal 2021, eq. 17)
linear        b from 1e-4 to 0.02 at T = 1000, both scaled by 1000/T (Ho et al. 2020)
scaled_linear b = linspace(sqrt(0.00085), sqrt(0.012))^2, scaled likewise (latent diffusion)

Steps are integers t in [0, T). The clean sample, which follows the last step, is written -1, with abar_{-1} =
1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unclip_jax.errors import InputError

CLEAN = -1


@dataclass(frozen=True, eq=False)
class Schedule:
    """A noise schedule of T steps; every table is a float64 array of length T."""

    betas: np.ndarray

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.betas)

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """abar_t."""
        return np.cumprod(1.0 - self.betas)

    def abar(self, steps: np.ndarray) -> np.ndarray:
        """abar at integer steps in [-1, T), where -1 is the clean sample and has abar 1."""
        steps = np.asarray(steps)
        return np.where(steps < 0, 1.0, self.alphas_cumprod[np.maximum(steps, 0)])


def cosine(num_steps: int, max_beta: float = 0.999) -> np.ndarray:
    """Betas of the cosine schedule, float64 (T,)."""
    u = np.arange(num_steps + 1, dtype=np.float64) / num_steps
    f = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1.0 - f[1:] / f[:-1], max_beta)


def linear(num_steps: int) -> np.ndarray:
    """Betas from 1e-4 to 0.02 (times 1000/T), float64 (T,)."""
    scale = 1000.0 / num_steps
    return np.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=np.float64)


def scaled_linear(num_steps: int) -> np.ndarray:
    """Betas with linear square roots from sqrt(0.00085) to sqrt(0.012) (betas times 1000/T), float64 (T,)."""
    scale = 1000.0 / num_steps
    return np.linspace(math.sqrt(scale * 0.00085), math.sqrt(scale * 0.012), num_steps, dtype=np.float64) ** 2


SCHEDULES = {"cosine": cosine, "linear": linear, "scaled_linear": scaled_linear}


def make_schedule(name: str, num_steps: int = 1000) -> Schedule:
    """The named schedule.

    Raises:
      ValueError: on an unknown name, or on a number of steps for which the betas leave (0, 1).
    """
    if name not in SCHEDULES:
        raise InputError(f"unknown noise schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    betas = SCHEDULES[name](num_steps)
    if not (np.all(betas > 0) and np.all(betas < 1)):
        raise InputError(f"the {name} schedule has no valid betas with {num_steps} steps; use more steps")
    return Schedule(betas)


def strided_steps(num_steps: int, count: int) -> np.ndarray:
    """`count` time steps, evenly spread over [0, T) with the first and the last included; descending int64
    (count,).

    With count = 1 the single step is T - 1. Where the stride is not an integer (64 or 250 of 1000), every
    step is rounded.

    Raises:
      ValueError: unless 1 <= count <= num_steps.
    """
    if not 1 <= count <= num_steps:
        raise InputError(f"sampling steps must be between 1 and {num_steps}, got {count}")
    if count == 1:
        return np.array([num_steps - 1])
    return np.round(np.arange(count) * (num_steps - 1) / (count - 1)).astype(np.int64)[::-1].copy()


# GLIDE's hand-tuned steps for its upsampler, T = 1000.
NAMED_STEPS = {
    "fast27": (
        *(0, 22, 44, 66, 88, 111, 133, 155, 177, 199),
        *(200, 222, 244, 266, 288, 311, 333, 355, 377, 399),
        *(400, 500, 599, 600, 799, 800, 997),
    ),
}


def segment_steps(num_steps: int, counts: Sequence[int]) -> np.ndarray:
    """Cuts [0, T) into len(counts) segments and spreads counts[i] steps evenly over segment i.

    The segments start at the clean end (Nichol and Dhariwal 2021). They have T // n steps each, and the first
    T % n of them have one more. Both ends of a segment are taken, or its start where the count is 1.

    Returns:
      Descending int64 (sum(counts),).

    Raises:
      ValueError: when a segment has fewer steps than its count, or a count is below 1.
    """
    n, steps, start = len(counts), [], 0
    for i, count in enumerate(counts):
        size = num_steps // n + (i < num_steps % n)
        if not 1 <= count <= size:
            raise InputError(f"segment {i + 1} of {n} has {size} steps; cannot take {count} of them")
        steps.append(start + (strided_steps(size, count)[::-1] if count > 1 else np.array([0])))
        start += size
    return np.concatenate(steps)[::-1].copy()


def integer_stride_steps(num_steps: int, count: int) -> np.ndarray:
    """The steps 0, k, 2k, ... below T for the integer stride k that gives exactly `count` of them;
    descending.

    This is DDIM's choice (Song et al. 2021).

    Raises:
      ValueError: when no integer stride gives `count` steps.
    """
    for stride in range(1, num_steps + 1):
        if len(range(0, num_steps, stride)) == count:
            return np.arange(0, num_steps, stride)[::-1].copy()
    raise InputError(
        f"no integer stride takes {count} of {num_steps} steps; give the number alone for a fractional stride"
    )


def time_steps(num_steps: int, steps: int | str | Sequence[int]) -> np.ndarray:
    """The time steps of a sampler, descending int64.

    Args:
      num_steps: T.
      steps: one of
        a number: that many steps, evenly spread (`strided_steps`);
        "ddim25": 25 steps at an integer stride (`integer_stride_steps`);
        "10,10,3,2,2": segments (`segment_steps`);
        "fast27": a named list (`NAMED_STEPS`, T = 1000);
        a sequence: the time steps themselves.

    Raises:
      ValueError: on a number out of range, an unknown name, or listed time steps outside [0, T) or repeated.
    """
    if isinstance(steps, str):
        if steps in NAMED_STEPS:
            if num_steps != 1000:
                raise InputError(f"the steps {steps} are made for 1000 steps, not {num_steps}")
            return np.array(NAMED_STEPS[steps])[::-1].copy()
        if match := re.fullmatch(r"ddim([0-9]{1,18})", steps):
            return integer_stride_steps(num_steps, int(match[1]))
        if re.fullmatch(r"[0-9]{1,18}(,[0-9]{1,18})*", steps):
            counts = [int(c) for c in steps.split(",")]
            return (
                segment_steps(num_steps, counts) if len(counts) > 1 else strided_steps(num_steps, counts[0])
            )
        raise InputError(
            f"sampling steps {steps!r}: give a number, segments such as 10,10,3,2,2, ddim25, "
            f"or {', '.join(NAMED_STEPS)}"
        )
    if isinstance(steps, Sequence):
        listed = np.unique(np.asarray(steps, np.int64))[::-1].copy() if len(steps) else np.zeros(0, np.int64)
        if len(listed) != len(steps) or len(listed) == 0 or listed[0] >= num_steps or listed[-1] < 0:
            raise InputError(
                f"listed sampling steps must be distinct, at least one, and between 0 and {num_steps - 1}"
            )
        return listed
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)):
        raise InputError(f"sampling steps must be a whole number, text or a list, got {steps!r}")
    return strided_steps(num_steps, int(steps))
