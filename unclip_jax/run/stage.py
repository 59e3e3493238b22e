"""`Stage`: all that training, compiling ahead of time and the tests ask of a stage.

An objective is a function (params, extra, rng, batch, step, *, frozen) -> loss (), (metrics, extra). `extra` is state without
gradients (codebooks, batch statistics); most stages have none, and `without_extra` makes an objective of a plain loss. `frozen` holds the
parameters of the networks under the stage by role, and under `FITTED` what `Stage.fit` measured.
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

    name: on its metrics and in the checkpoint; "" where a stage has a single player.
    parameters: the top-level names of the parameters that it trains; () for all.
    objective: None for the stage's.
    gradient: replaces plain differentiation of the objective (SAM); None otherwise.
    project: keeps parameters where they belong, after each update.
    optimizer: the section of the configuration that describes the optimizer.
    """

    name: str = ""
    parameters: tuple[str, ...] = ()
    objective: Objective | None = None
    gradient: Gradient | None = None
    project: Callable[[Any], Any] = lambda params: params
    optimizer: str = "optimizer"


class Fit(NamedTuple):
    """What a run measures on its training data before the first step.

    measure: (run) -> values (JSON) that join the part's configuration; `loop.Run.measuring_batches` gives it training batches.
    arrays: the part's configuration -> arrays, which the objective finds in `frozen[FITTED]`.
    keys: the names of the values in the part's configuration.
    """

    measure: Callable[[Any], dict]
    arrays: Callable[[dict], Any]
    keys: tuple[str, ...]


class Stage(NamedTuple):
    """One stage of a cascade, as its configuration describes it.

    name: of the part that it trains.
    model: the linen module.
    part: the part's configuration: kind, model, frozen hashes, tokenizer, diffusion. With a `fit` it holds placeholders of the right shape
      until the fit has been made.
    init: key -> (parameters, extra).
    example: (record, rng, training=True) -> one row of a batch (`data.examples`).
    objective: see the module's docstring; the held-out loss too.
    players: who trains which parameters; one, but for adversarial training.
    fit: what is measured before the first step, None for nothing.
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
    """The objective of a loss (params, rng, batch, *, frozen) -> loss (), metrics."""

    @functools.wraps(loss_fn, assigned=())
    def objective(params, extra, rng, batch, step, *, frozen):
        del step
        loss, metrics = loss_fn(params, rng, batch, frozen=frozen)
        return loss, (metrics, extra)

    return objective


def without_gradient(
    loss_fn: Callable[..., tuple[jax.Array, dict]], name: str
) -> Callable[..., tuple[jax.Array, dict]]:
    """The loss (params, rng, batch, *, frozen) with no gradient for the parameters below the top-level `name`."""

    def stopped(params, rng, batch, *, frozen):
        params = params | {name: jax.lax.stop_gradient(params[name])}
        return loss_fn(params, rng, batch, frozen=frozen)

    return stopped
