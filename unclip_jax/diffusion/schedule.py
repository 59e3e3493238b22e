"""Noise schedules as float64 tables, and the choice of time steps.

A schedule is a list of betas b_0..b_{T-1}; abar_t = prod_{i<=t} (1 - b_i), and x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps.

cosine        f(u) = cos^2((u + 0.008) / 1.008 * pi/2), b_i = 1 - f((i+1)/T) / f(i/T), at most 0.999 (Nichol and Dhariwal 2021, eq. 17)
linear        b from 1e-4 to 0.02 at T = 1000, both scaled by 1000/T (Ho et al. 2020)
scaled_linear b = linspace(sqrt(0.00085), sqrt(0.012))^2, scaled likewise (latent diffusion)

Steps are integers t in [0, T); the step after the last one (the clean sample) is written -1, with abar_{-1} = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

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
    """Betas whose square roots run linearly from sqrt(0.00085) to sqrt(0.012) (times 1000/T), float64 (T,)."""
    scale = 1000.0 / num_steps
    return np.linspace(math.sqrt(scale * 0.00085), math.sqrt(scale * 0.012), num_steps, dtype=np.float64) ** 2


SCHEDULES = {"cosine": cosine, "linear": linear, "scaled_linear": scaled_linear}


def make_schedule(name: str, num_steps: int = 1000) -> Schedule:
    """The named schedule.

    Raises:
      ValueError: on an unknown name, or on a number of steps for which the betas leave (0, 1).
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown noise schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    betas = SCHEDULES[name](num_steps)
    if not (np.all(betas > 0) and np.all(betas < 1)):
        raise ValueError(f"the {name} schedule has no valid betas with {num_steps} steps; use more steps")
    return Schedule(betas)


def strided_steps(num_steps: int, count: int) -> np.ndarray:
    """`count` time steps spread evenly over [0, T), rounded, first and last included; descending, int64 (count,).

    With count = 1 the single step is T - 1. A stride that is not an integer is rounded step by step (64 or 250 of 1000).

    Raises:
      ValueError: unless 1 <= count <= num_steps.
    """
    if not 1 <= count <= num_steps:
        raise ValueError(f"sampling steps must be between 1 and {num_steps}, got {count}")
    if count == 1:
        return np.array([num_steps - 1])
    return np.round(np.arange(count) * (num_steps - 1) / (count - 1)).astype(np.int64)[::-1].copy()
