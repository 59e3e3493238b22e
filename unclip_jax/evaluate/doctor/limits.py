"""The usual ranges of the doctor's figures, and the measurements that they come from.

Most figures are relative: to chance, to a baseline that the same run computes, or to another reading of the
same rows. So they hold for embeddings and pictures of any size and origin. TABLE
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from unclip_jax.evaluate.doctor.report import Finding, Limits, finding

INF = math.inf


def _at_least(usual: float, bearable: float) -> Limits:
    return Limits((usual, INF), (bearable, INF))


def _at_most(usual: float, bearable: float) -> Limits:
    return Limits((-INF, usual), (-INF, bearable))


# ------------------------------------------------------------------------------------------ all parts
DEAD = _at_most(0.02, 0.25)
# Another reading must not fit better than the reading as it is.
WHAT_IF = _at_least(0.9, 0.8)
WHAT_IF_OF_TEXT = _at_least(0.8, 0.6)
EMA = _at_most(1.1, 1.5)

# ------------------------------------------------------------------------------------------ CLIP
ALIGNMENT = _at_least(0.8, 0.3)

# ------------------------------------------------------------------------------------------ joints
NORM_RATIO = Limits((0.7, 1.4), (0.5, 2.0))
SPREAD_RATIO = Limits((0.5, 1.6), (0.3, 2.5))

# ------------------------------------------------------------------------------------------ diffusion
NOISY_END = _at_most(0.1, 0.3)
CLEAN_END = _at_most(0.1, 0.3)

# ------------------------------------------------------------------------------------------ priors
OVER_MEAN = _at_least(0.05, 0.0)
OVER_TEXT = _at_least(-0.02, -INF)
WHAT_IF_OF_EMBEDDINGS = _at_least(0.8, 0.6)
WHAT_IF_SPACE = _at_least(0.6, 0.5)
SPACE_SCALE = Limits((0.4, 2.0), (0.0, INF))
CODEC = _at_least(0.8, 0.5)

# ------------------------------------------------------------------------------------------ pictures
TO_WIENER = _at_most(0.75, 1.0)
TO_WIENER_OF_EMBEDDINGS = _at_most(1.1, 1.5)
CONDITIONING = _at_most(0.95, 1.02)
VARIANCE_INSIDE = _at_least(0.7, 0.3)
ORACLE = _at_least(0.2, 0.05)
PRIOR_SHARE = Limits((0.3, INF), (-INF, INF))
GUIDANCE = Limits((0.9, INF), (-INF, INF))
TO_ENLARGED = _at_most(0.9, 1.1)
FAITHFUL = _at_most(0.1, 0.3)


def what_if(
    stage: str,
    figure: str,
    losses: Mapping[str, float],
    change: str,
    limits: Limits = WHAT_IF,
    needs: tuple[str, ...] = (),
) -> Finding:
    """Judges the smallest of the losses of other readings, each divided by the loss as it is."""
    best = min(losses, key=losses.get)
    return finding(stage, figure, losses[best], limits, f"{best} fits better: {change}", needs, losses)
