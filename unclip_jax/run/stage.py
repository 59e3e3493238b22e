"""`Stage`: everything that training, ahead-of-time compilation and the tests need to know about a stage.

An objective is a function (params, extra, rng, batch, step, *, frozen) -> loss (), (metrics, extra).
`extra` is state without gradients, such as codebooks or batch statistics. Most stages have none;
`without_extra` makes an objective from a plain loss. `frozen` holds the parameters of the stage's frozen
networks by role. Under the role `FITTED` it holds the values that `Stage.fit` measured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from unclip_jax.data.pipeline import MakeExample

Objective = Callable[..., tuple[jax.Array, tuple[dict, Any]]]
# (params, extra, rng, batch, step, *, frozen) -> ((loss, (metrics, extra)), gradient)
Gradient = Callable[..., tuple[tuple[jax.Array, tuple[dict, Any]], Any]]
FITTED = "fitted"


class Player(NamedTuple):
    """A group of parameters that one optimizer trains on one objective.

    name: its name in metrics and checkpoints; "" for the only player of a stage.
    parameters: the top-level names of the parameters that it trains; () for all.
    objective: its objective; None for the stage's.
    gradient: replaces plain differentiation of the objective (SAM); None otherwise.
    project: (params, extra) -> params: moves parameters back into their bounds after each update, or sets
      those that `extra` decides, such as a codebook of averages. Averaged parameters go through it, too.
    optimizer: the section of the configuration that describes its optimizer.
    """

    name: str = ""
    parameters: tuple[str, ...] = ()
    objective: Objective | None = None
    gradient: Gradient | None = None
    project: Callable[[Any, Any], Any] = lambda params, extra: params
    optimizer: str = "optimizer"


class Fit(NamedTuple):
    """What a run measures on its training data before the first step.

    measure: (run) -> JSON values that are added to the part's configuration. It gets training batches from
      `loop.Run.measuring_batches`.
    arrays: the part's configuration -> the arrays that the objective finds in `frozen[FITTED]`.
    keys: the names of those values in the part's configuration.
    """

    measure: Callable[[Any], dict]
    arrays: Callable[[dict], Any]
    keys: tuple[str, ...]


class Stage(NamedTuple):
    """One stage of a cascade, as its configuration describes it.

    name: name of the part that it trains.
    model: the linen module.
    part: the part's configuration: kind, model, frozen hashes, tokenizer, diffusion. If the stage has a
      `fit`, it holds placeholders of the right shape until the run has measured the fit.
    init: key -> (parameters, extra).
    example: (record, rng, training=True) -> one row of a batch (`data.examples`).
    objective: see the module's docstring; the held-out loss uses it, too.
    players: which optimizers train which parameters; one player, except in adversarial training. There the
      part that the stage releases is what the first player trains, and only that is averaged.
    fit: what the run measures before the first step; None for nothing.
    """

    name: str
    model: nn.Module
    part: dict
    init: Callable[[jax.Array], tuple[Any, Any]]
    example: MakeExample
    objective: Objective
    players: tuple[Player, ...] = (Player(),)
    fit: Fit | None = None


def without_extra(loss_fn: Callable[..., tuple[jax.Array, dict]]) -> Objective:
    """Makes an objective from a plain loss (params, rng, batch, *, frozen) -> loss (), metrics."""

    @functools.wraps(loss_fn, assigned=())
    def objective(params, extra, rng, batch, step, *, frozen):
        del step
        loss, metrics = loss_fn(params, rng, batch, frozen=frozen)
        return loss, (metrics, extra)

    return objective


def without_gradient(
    loss_fn: Callable[..., tuple[jax.Array, dict]], name: str
) -> Callable[..., tuple[jax.Array, dict]]:
    """Makes a loss (params, rng, batch, *, frozen) without gradient for the parameters below `name`.

    `name` is a top-level name of the parameters.
    """

    def stopped(params, rng, batch, *, frozen):
        params = params | {name: jax.lax.stop_gradient(params[name])}
        return loss_fn(params, rng, batch, frozen=frozen)

    return stopped
