"""How a sampler's steps are spread over [0, T), and where each one leads.

Our own spacing, `even`, spreads the steps over [0, T) with both ends, and each step leads to the next one.
The others are those that latent diffusion is used with, by the names of Lin et al. (2024, table 2). N steps,
and a stride k = floor(T / N):

leading    0, k, 2 k, ..., plus an offset
trailing   round(T - i T / N) - 1
linspace   N numbers evenly from 0 to T - 1

A sampler of order one by DDIM's formula (`ddim`, `plms`) rounds them and goes from t to t - k, whatever the
next step of the list is; so it was published (CompVis) and so diffusers runs it. `euler` and its ancestral
form go to the next step and may stand between two steps, where sigma = sqrt((1 - abar) / abar) is
interpolated. `dpmpp_2m` takes N + 1 numbers, with k = floor(T / (N + 1)), and drops the smallest.

The last step leads to the clean sample, or to the schedule's first level, abar_0 (`last` is "clean" or
"first").
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from unclip_jax.diffusion.schedule import CLEAN
from unclip_jax.errors import InputError

SPACINGS = ("even", "leading", "trailing", "linspace")
LASTS = ("clean", "first")
STRIDED = ("ddim", "plms")  # the samplers that go to t - k


class Moves(NamedTuple):
    """The moves of a sampler: float64 or int64 (N,) each.

    t: the level of the sample, and the step that the network sees; descending.
    r: the level that the move leads to; CLEAN is the clean sample.
    """

    t: np.ndarray
    r: np.ndarray


def spaced(
    num_steps: int, count: int, spacing: str, *, sampler: str = "ddim", offset: int = 0, last: str = "clean"
) -> Moves:
    """The moves of a sampler (module docstring).

    Args:
      num_steps: T.
      count: N, sampling steps.
      spacing: `leading`, `trailing` or `linspace`.
      sampler: one of `samplers.SAMPLERS`.
      offset: added to the steps of `leading`.
      last: one of LASTS.

    Returns:
      The moves. `plms` calls the network once more than they are.

    Raises:
      ValueError: on an unknown spacing, a number of steps out of range, or an offset that leads out of [0,
        T).
    """
    if spacing not in SPACINGS[1:]:
        raise InputError(f"unknown spacing {spacing!r}; choose one of {', '.join(SPACINGS)}")
    if last not in LASTS:
        raise InputError(f"unknown last {last!r}; choose one of {', '.join(LASTS)}")
    drop = sampler == "dpmpp_2m"
    most = num_steps - 1 if drop else num_steps
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or not 1 <= count <= most:
        raise InputError(
            f"the spacing {spacing} takes a whole number of steps from 1 to {most}, got {count!r}"
        )
    points = count + 1 if drop and spacing != "trailing" else count
    if spacing == "leading":
        t = np.arange(points)[::-1] * (num_steps // points)
        t = (t[:-1] if drop else t) + offset
    elif spacing == "trailing":
        t = np.round(np.arange(num_steps, 0, -num_steps / count)).astype(np.int64) - 1
    else:
        t = np.linspace(0, num_steps - 1, points)[::-1]
        t = t if sampler.startswith("euler") else np.round(t).astype(np.int64)
        t = t[:-1] if drop else t
    if not 0 <= t[-1] <= t[0] <= num_steps - 1:
        raise InputError(f"an offset of {offset} leads out of the {num_steps} steps; use 0 or fewer steps")
    end = CLEAN if last == "clean" else 0
    if sampler in STRIDED:
        r = t - num_steps // count
        return Moves(t, np.where(r < 0, end, r))
    return Moves(t, np.append(t[1:], end))
