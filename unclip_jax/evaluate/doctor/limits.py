"""The usual ranges of the doctor's figures, and the measurements that they come from.

Most figures are relative: to chance, to a baseline that the same run computes, or to another reading of the
same rows. So they hold for embeddings and pictures of any size and origin. Inside `usual` a figure is sound.
Outside `bearable` it is a fault, and between the two a warning. A figure that says how hard the data is, and
not that a part is wrong, has no bearable end: it only warns.

The sound parts are the shipped bundles `emoji` and `judge`, each on 32 to 128 rows of `compose` (combinations
not seen in training), `train` and `val` (names not seen in training). Planted faults are those of
`tests/evaluate/test_doctor.py` and `test_doctor_systems.py`.

| figure                                | sound: compose, train, val | planted fault       | usual, bearable |
|---------------------------------------|----------------------------|---------------------|-----------------|
| CLIP: own captions above others       | 2.9, 3.2, 1.3; judge 3.5   |                     | 0.8, 0.3        |
| CLIP: loss with shifted tokens        | 0.89 to 1.1                | 0.05                | 0.8, 0.6        |
| CLIP: loss with pictures otherwise    | 0.93 to 1.2                | 0.18                | 0.9, 0.8        |
| prior: error by a linear filter's     | 0.30, 0.25, 0.86           | 1.8 (other scale)   | 1.1, 1.5        |
| prior: error in another space         | 0.99, 1.2, 0.67            | 0.20                | 0.6, 0.5        |
| prior: error with another schedule    | 0.97, 1.0, 0.90            | not seen            | 0.8, 0.6        |
| prior: cosine above the mean's        | 0.74                       |                     | 0.05, 0         |
| joint: norm of z_i                    | 1.00; autoregressive 1.04  |                     | 0.7-1.4, 0.5-2  |
| decoder: error by a linear filter's   | 0.42, 0.38, 0.44           | 4.4, 4.2 (below)    | 0.75, 1         |
| decoder: error with another schedule  | 1.6, 1.7, 1.7              | 0.34                | 0.9, 0.8        |
| decoder: error with blue before red   | 1.8, 2.0, 1.7              | 0.13                | 0.9, 0.8        |
| decoder: error with own z_i           | 0.23, 0.31 (32 rows)       |                     | 0.95, 1.02      |
| decoder: error with other norm of z_i | 1.1                        | 0.22                | 0.9, 0.8        |
| decoder: variance inside its bounds   | 0.83; inpainting 0.92      |                     | 0.7, 0.3        |
| decoder: likeness from true z_i       | 0.90                       |                     | 0.2, 0.05       |
| upsampler: error by a linear filter's | 0.12                       | 0.51 (schedule)     | 0.75, 1         |
| upsampler: error with another schedule| 2.5                        | 0.17                | 0.9, 0.8        |
| upsampler: error by bicubic's         | 0.66                       |                     | 0.9, 1.1        |
| upsampler: change of its input        | 0.003                      |                     | 0.1, 0.3        |
| captioned: error with own caption     | not measured               | 1 (deaf)            | 0.999, none     |
| autoencoder: error of decoded pictures| not measured               | 1 (mean picture)    | 0.5, 1          |
| codes: perplexity by the largest      | not measured               | 0.0001 (one code)   | 0.02, none      |

The two faults of the decoder are weights at their start, and an average that holds half of the start. An
average that holds 0.2 of it gives 1.4, a fault; one that holds 0.1 gives 0.68, which is taken as usual.

A prior that predicts x0 from the caption hardly looks at its noised input, so a wrong schedule does not show
in it, and hardly harms it.
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
OWN_CAPTION = Limits((-INF, 0.999), (-INF, INF))

# ------------------------------------------------------------------------------------------ codes
# 1 is the error of the mean picture.
DECODED = _at_most(0.5, 1.0)
CODE_USE = Limits((0.02, INF), (-INF, INF))


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
