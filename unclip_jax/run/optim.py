"""AdamW and Adafactor with the usual weight-decay mask, learning-rate schedules with a warmup, and gradient
clipping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax

from unclip_jax.errors import InputError
from unclip_jax.sharding import path_name

SCHEDULES = ("cosine", "constant")
COUNTING = ("ScaleByAdam", "FactoredState")  # the optimizers' states that count the updates


class Optimizer(NamedTuple):
    """tx: the transformation of gradients into updates. learning_rate: count of applied updates -> rate."""

    tx: optax.GradientTransformation
    learning_rate: optax.Schedule


def decay_mask(params: Any) -> Any:
    """Which parameters weight decay shrinks (Radford et al. 2021, section 2.5).

    Returns:
      A tree of the parameters' structure: True for matrices and kernels; False for biases, gains, vectors and
      scalars.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.ndim >= 2 and path_name(path).split("/")[-1] != "bias", params
    )


def make_optimizer(
    *,
    learning_rate: float,
    steps: int,
    kind: str = "adamw",
    warmup_steps: int = 0,
    schedule: str = "cosine",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
    mu_dtype: str | None = None,
) -> Optimizer:
    """The optimizer and its learning-rate schedule.

    Args:
      kind: `adamw`; or `adafactor` (Shazeer and Stern 2018), which keeps the second moments of a matrix by
        rows and columns alone, with a fixed rate, `b1` for the first moment, and updates clipped at 1. `b2`
        and `eps` are then not used: the second moment's decay approaches 1 as 1 - step^-0.8.
      learning_rate: peak of the learning rate.
      steps: number of steps of the run; the cosine reaches zero there.
      warmup_steps: steps over which the rate rises linearly from zero to the peak.
      schedule: of the rate after the warmup: `cosine` or `constant`.
      clip_norm: global norm to which gradients are clipped; None: no clipping.
      mu_dtype: dtype of the first moment; `bfloat16` halves its memory; None: float32.

    Raises:
      ValueError: on an unknown schedule or mu_dtype, or a warmup as long as the training.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"unknown learning-rate schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if mu_dtype not in (None, "float32", "bfloat16"):
        raise InputError(f"unknown mu_dtype {mu_dtype!r}; choose float32, bfloat16 or None")
    if warmup_steps >= steps:
        raise InputError(f"warmup_steps {warmup_steps} must be fewer than steps {steps}")
    if schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, steps)
    else:
        rate = optax.join_schedules(
            [
                optax.linear_schedule(0.0, learning_rate, max(warmup_steps, 1)),
                optax.constant_schedule(learning_rate),
            ],
            [warmup_steps],
        )
    chain = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    if kind == "adafactor":
        chain.append(
            optax.adafactor(
                rate, multiply_by_parameter_scale=False, momentum=b1 or None,
                dtype_momentum=mu_dtype or "float32", weight_decay_rate=weight_decay or None,
                weight_decay_mask=decay_mask,
            )
        )  # fmt: skip
    else:
        chain.append(
            optax.adamw(
                rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask, mu_dtype=mu_dtype
            )
        )
    return Optimizer(optax.chain(*chain), rate)


def make_optimizers(config: Any, players: Sequence[Any]) -> tuple[Optimizer, ...]:
    """The optimizer of each of a stage's players (`stage.Player`), as the configuration describes it."""
    return tuple(make_optimizer(steps=config.steps, **config[player.optimizer]) for player in players)


def updates_applied(opt_state: Any) -> jax.Array:
    """The number of updates that the optimizer has applied; skipped updates do not count."""
    return optax.tree.get(
        opt_state, "count", filtering=lambda path, _: any(name in str(path) for name in COUNTING)
    )
