"""Noise schedules as float64 tables, and the choice of time steps.

A schedule is a list of betas b_0..b_{T-1}; abar_t = prod_{i<=t} (1 - b_i), and x_t = sqrt(abar_t) x0 + sqrt(1
- abar_t) eps.

cosine        f(u) = cos^2((u + 0.008) / 1.008 * pi/2), b_i = 1 - f((i+1)/T) / f(i/T), at most 0.999
              (Nichol and Dhariwal 2021, eq. 17)
linear        b from 1e-4 to 0.02 at T = 1000, both scaled by 1000/T (Ho et al. 2020)
scaled_linear b = linspace(sqrt(0.00085), sqrt(0.012))^2, scaled likewise (latent diffusion)

Their ends may be given, and they are then not scaled. With `zero_snr`, the roots of abar are shifted and
scaled so that the last one is zero and the first one stays (Lin et al. 2024, section 3.1): x_{T-1} is noise
alone.

Steps are integers t in [0, T). The clean sample, which follows the last step, is written -1, with abar_{-1} =
1. Between two steps, sigma = sqrt((1 - abar) / abar) is interpolated.

In continuous time (Kingma et al. 2021; Saharia et al. 2022, section 2) a schedule is a function of u in
[0, 1]: the logarithm of the signal-to-noise ratio, lambda(u) = ln(abar / (1 - abar)), bounded to [-20, 20].
It is the limit of the schedule of the same name for T to infinity:

cosine        abar(u) = f(u) / f(0)
linear        ln abar(u) = -(0.1 u + 9.95 u^2), minus the integral of the betas times T
scaled_linear likewise

A time u is written as the step t = T u - 1, which need not be whole. At whole steps the cosine schedule is
that of T steps, up to the bound of beta. T is then no more than the unit in which a network sees time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unclip_jax.errors import InputError

CLEAN = -1
# abar of a last step without signal, where a sampler divides by it; so diffusers runs it.
SMALLEST_ABAR = 2.0**-24
LARGEST_LOG_SNR = 20.0
MOST_CONTINUOUS = 10_000  # the largest T in continuous time, so that every whole step has a beta above 0


@dataclass(frozen=True, eq=False)
class Schedule:
    """A noise schedule of T steps; every table is a float64 array of length T.

    continuous: the name of the schedule in continuous time whose values at the whole steps the tables hold;
    None for a schedule of T steps.
    """

    betas: np.ndarray
    continuous: str | None = None

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.betas)

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """abar_t."""
        return np.cumprod(1.0 - self.betas)

    def abar(self, steps: np.ndarray) -> np.ndarray:
        """abar at steps in [-1, T), where -1 is the clean sample and has abar 1."""
        steps, table = np.asarray(steps), self.alphas_cumprod
        if self.continuous is not None:
            return np.where(steps <= CLEAN, 1.0, self.traced_abar(steps, np))
        if steps.dtype.kind == "f":
            table = np.maximum(table, SMALLEST_ABAR)
            sigma = np.interp(steps, np.arange(len(table)), np.sqrt((1 - table) / table))
            return np.where(steps < 0, 1.0, 1 / (1 + sigma**2))
        return np.where(steps < 0, 1.0, table[np.maximum(steps, 0)])

    def traced_abar(self, steps: Any, xp: Any) -> Any:
        """abar at steps in [-1, T) of a schedule in continuous time, with the arrays of `xp` (NumPy's or
        jax's). At -1 it is that of the largest lambda."""
        return 1 / (1 + xp.exp(-log_snr(self.continuous, (steps + 1) / self.num_steps, xp)))


def cosine(num_steps: int, max_beta: float = 0.999) -> np.ndarray:
    """Betas of the cosine schedule, float64 (T,)."""
    u = np.arange(num_steps + 1, dtype=np.float64) / num_steps
    f = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1.0 - f[1:] / f[:-1], max_beta)


def linear(num_steps: int, ends: tuple[float, float] | None = None) -> np.ndarray:
    """Betas from 1e-4 to 0.02 (times 1000/T), or between the `ends`, float64 (T,)."""
    scale = 1000.0 / num_steps
    first, last = (scale * 1e-4, scale * 0.02) if ends is None else ends
    return np.linspace(first, last, num_steps, dtype=np.float64)


def scaled_linear(num_steps: int, ends: tuple[float, float] | None = None) -> np.ndarray:
    """Betas with linear square roots from sqrt(0.00085) to sqrt(0.012) (betas times 1000/T), or between the
    `ends`, float64 (T,)."""
    scale = 1000.0 / num_steps
    first, last = (scale * 0.00085, scale * 0.012) if ends is None else ends
    return np.linspace(math.sqrt(first), math.sqrt(last), num_steps, dtype=np.float64) ** 2


def _cosine_log_snr(u: Any, xp: Any) -> Any:
    # f(u) / (f(0) - f(u)), and cos^2 y - cos^2 x = sin(x + y) sin(x - y).
    rate, start = math.pi / 2 / 1.008, 0.008 / 1.008 * math.pi / 2
    noise = xp.sin(rate * u) * xp.sin(rate * u + 2 * start)
    return 2 * xp.log(xp.abs(xp.cos(rate * u + start))) - xp.log(noise)


def _linear_log_snr(u: Any, xp: Any) -> Any:
    return -xp.log(xp.expm1(0.1 * u + 9.95 * u**2))


def _scaled_linear_log_snr(u: Any, xp: Any) -> Any:
    first, last = math.sqrt(0.85), math.sqrt(12)
    slope = last - first
    return -xp.log(xp.expm1(((first + slope * u) ** 3 - first**3) / (3 * slope)))


LOG_SNRS = {"cosine": _cosine_log_snr, "linear": _linear_log_snr, "scaled_linear": _scaled_linear_log_snr}


def log_snr(name: str, u: Any, xp: Any = np) -> Any:
    """lambda(u), the logarithm of the signal-to-noise ratio in continuous time (module docstring).

    Args:
      name: one of LOG_SNRS.
      u: times in [0, 1], an array of `xp` of any shape. 0 is clean, 1 is noise.
      xp: `numpy` or `jax.numpy`.

    Returns:
      An array of u's shape, falling in u, in [-LARGEST_LOG_SNR, LARGEST_LOG_SNR].
    """
    with np.errstate(divide="ignore"):
        return xp.clip(LOG_SNRS[name](u, xp), -LARGEST_LOG_SNR, LARGEST_LOG_SNR)


SCHEDULES = {"cosine": cosine, "linear": linear, "scaled_linear": scaled_linear}


def zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas whose last abar is zero (module docstring), float64 (T,)."""
    roots = np.sqrt(np.cumprod(1.0 - betas))
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    abar = roots**2
    return 1.0 - np.append(abar[:1], abar[1:] / abar[:-1])


def make_schedule(
    name: str,
    num_steps: int = 1000,
    beta_ends: tuple[float, float] | None = None,
    zero_snr: bool = False,
    continuous: bool = False,
) -> Schedule:
    """The named schedule.

    Args:
      name: one of SCHEDULES.
      num_steps: T.
      beta_ends: the first and the last beta, where they are not those of the name.
      zero_snr: makes the last abar zero.
      continuous: the schedule in continuous time.

    Raises:
      ValueError: on an unknown name, on ends of `cosine`, or on betas that leave (0, 1); in continuous time
        on ends, `zero_snr`, or a T above MOST_CONTINUOUS.
    """
    if name not in SCHEDULES:
        raise InputError(f"unknown noise schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    if continuous:
        if beta_ends is not None or zero_snr:
            raise InputError("a schedule in continuous time has neither beta_ends nor zero_snr")
        if not 2 <= num_steps <= MOST_CONTINUOUS:
            raise InputError(
                f"num_steps is the unit of time of a continuous schedule: from 2 to {MOST_CONTINUOUS}, "
                f"got {num_steps}"
            )
        lambdas = log_snr(name, (np.arange(num_steps) + 1) / num_steps)
        abar = 1 / (1 + np.exp(-lambdas))
        return Schedule(1 - np.append(abar[:1], abar[1:] / abar[:-1]), name)
    if beta_ends is None:
        betas = SCHEDULES[name](num_steps)
    elif name == "cosine":
        raise InputError("the cosine schedule has no beta_ends")
    elif not 0 < beta_ends[0] <= beta_ends[1] < 1:
        raise InputError(f"beta_ends must be 0 < first <= last < 1, got {beta_ends[0]}, {beta_ends[1]}")
    else:
        betas = SCHEDULES[name](num_steps, tuple(beta_ends))
    if not (np.all(betas > 0) and np.all(betas < 1)):
        raise InputError(f"the {name} schedule has no valid betas with {num_steps} steps; use more steps")
    return Schedule(zero_terminal_snr(betas) if zero_snr else betas)


def schedule_of(diffusion: Mapping[str, Any]) -> Schedule:
    """The schedule of a part's `diffusion` settings: schedule, num_steps, beta_ends, zero_snr, continuous.

    Raises:
      ValueError: as `make_schedule`.
    """
    ends = diffusion.get("beta_ends")
    return make_schedule(
        diffusion["schedule"],
        diffusion["num_steps"],
        None if ends is None else tuple(ends),
        bool(diffusion.get("zero_snr", False)),
        bool(diffusion.get("continuous", False)),
    )


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


def continuous_steps(num_steps: int, count: int) -> np.ndarray:
    """`count` steps in continuous time, at u = 1, 1 - 1 / count, ..., 1 / count; descending float64 (count,).

    With count = T they are the whole steps.

    Raises:
      ValueError: unless 1 <= count <= num_steps.
    """
    strided_steps(num_steps, count)
    return np.arange(count, 0, -1) * (num_steps / count) - 1


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
