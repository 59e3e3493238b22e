"""The training state: creates it on the mesh, and makes the step that updates it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from unclip_jax.errors import InputError
from unclip_jax.run.optim import Optimizer, updates_applied
from unclip_jax.run.stage import Gradient, Objective, Player, Stage
from unclip_jax.sharding import Mesh, gather_rest, infer_shardings


@flax.struct.dataclass
class TrainState:
    """All values that training carries from step to step.

    step: () int32, number of batches seen.
    params: float32 tree of the parameters.
    ema_params: float32 tree of their exponential moving averages: of all parameters, or, with several
      players, of those that the first one trains.
    opt_state: optax state, which counts the updates applied; player name -> state if there are several
      players.
    extra: state without gradients; {} for most stages.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any
    extra: Any = flax.struct.field(default_factory=dict)


def abstract_state(
    stage: Stage, optimizers: tuple[Optimizer, ...], mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """The state's shapes and its shardings on the mesh, without computing anything.

    Args:
      stage: the stage to train.
      optimizers: one for each player (`optim.make_optimizers`).
      mesh: the devices that will hold the state.
    """
    shapes = jax.eval_shape(functools.partial(_create, stage, optimizers), jax.random.key(0))
    return shapes, infer_shardings(shapes, mesh)


def create_state(
    stage: Stage, optimizers: tuple[Optimizer, ...], seed: int, shardings: TrainState
) -> TrainState:
    """Initialises the state under `jit`, already sharded, so that no host ever holds a whole model.

    Args:
      stage: the stage to train.
      optimizers: one for each player (`optim.make_optimizers`).
      seed: of the initial parameters.
      shardings: the state's shardings (`abstract_state`).
    """
    return jax.jit(functools.partial(_create, stage, optimizers), out_shardings=shardings)(
        jax.random.key(seed)
    )


def _create(stage: Stage, optimizers: tuple[Optimizer, ...], key: jax.Array) -> TrainState:
    params, extra = stage.init(key)
    # The averages need a real copy, because the update receives the two trees as separate donated buffers.
    ema = jax.tree.map(lambda x: x + 0.0, released(params, stage.players))
    states = {p.name: o.tx.init(_chosen(params, p)) for p, o in zip(stage.players, optimizers, strict=True)}
    if not stage.players:  # fitted, not trained
        opt_state = optax.identity().init(params)
    else:
        opt_state = states if len(stage.players) > 1 else states[stage.players[0].name]
    return TrainState(jnp.zeros((), jnp.int32), params, ema, opt_state, extra)


def released(params: Any, players: Sequence[Player]) -> Any:
    """The parameters that are averaged and released: all, or those of the first of several players."""
    return _chosen(params, players[0]) if len(players) > 1 else params


def _chosen(params: Any, player: Player) -> Any:
    # The parameters that a player trains.
    return {name: params[name] for name in player.parameters} if player.parameters else params


def step_rng(seed: int, step: jax.Array) -> jax.Array:
    """The random key of a step: fold_in(key(seed), step). It does not depend on earlier steps."""
    return jax.random.fold_in(jax.random.key(seed), step)


def ema_decay_at(step: jax.Array, ema_decay: float) -> jax.Array:
    """The decay of the moving average at a step n: (1 + n) / (10 + n), at most `ema_decay`.

    The smaller decay at the beginning lets the average forget the initialisation.
    """
    return jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))


def accumulated(objective: Objective, count: int, mesh: Mesh) -> Gradient:
    """The gradient of an objective, averaged over `count` parts of the batch, computed one after the other.

    Args:
      objective: a function whose loss and metrics are means over the batch's rows. Each part passes `extra`
        on to the next part.
      count: number of parts; it must divide the rows on each device. Part i holds every count-th row and has
        its own random key.
      mesh: the devices that hold the parameters; parameters outside of blocks are gathered before use
        (`sharding.gather_rest`).

    Returns:
      (params, extra, rng, batch, step, *, frozen, fixed={}) -> ((loss, (metrics, extra)), gradient). `fixed`
      holds further top-level parameters, which get no gradient.

    Raises:
      ValueError: when count is less than 1.
    """
    if count < 1:
        raise InputError(f"grad_accumulation must be at least 1, got {count}")

    def gradient_of(params, extra, rng, batch, step, frozen, fixed):
        def loss_of(params):
            params = gather_rest({**fixed, **params} if fixed else params, mesh)
            return objective(params, extra, rng, batch, step, frozen=frozen)

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    def gradient(params, extra, rng, batch, step, *, frozen, fixed: Mapping[str, Any] | None = None):
        if count == 1:
            return gradient_of(params, extra, rng, batch, step, frozen, fixed)
        rows = len(jax.tree.leaves(batch)[0])
        if rows % count:
            raise InputError(f"grad_accumulation {count} does not divide the batch of {rows}")
        # The parts are strided, so that every device has rows of every part and no row has to move.
        parts = jax.tree.map(
            lambda a: jnp.moveaxis(a.reshape(rows // count, count, *a.shape[1:]), 1, 0), batch
        )

        def add(carry, item):
            (total, extra), (i, part) = carry, item
            (loss, (metrics, extra)), grads = gradient_of(
                params, extra, jax.random.fold_in(rng, i), part, step, frozen, fixed
            )
            return (jax.tree.map(jnp.add, total, (loss, metrics, grads)), extra), None

        def shapes():
            (loss, (metrics, _)), grads = gradient_of(
                params, extra, rng, jax.tree.map(lambda a: a[0], parts), step, frozen, fixed
            )
            return loss, metrics, grads

        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(shapes))
        (total, new_extra), _ = jax.lax.scan(add, (zeros, extra), (jnp.arange(count), parts))
        loss, metrics, grads = jax.tree.map(lambda a: a / count, total)
        return (loss, (metrics, new_extra)), grads

    return gradient


def gradients_of(stage: Stage, grad_accumulation: int, mesh: Mesh) -> tuple[Gradient, ...]:
    """The gradient function of each of a stage's players."""
    return tuple(
        player.gradient or accumulated(player.objective or stage.objective, grad_accumulation, mesh)
        for player in stage.players
    )


def make_update(
    stage: Stage,
    optimizers: tuple[Optimizer, ...],
    shardings: TrainState,
    mesh: Mesh,
    config: Any,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted update step: (state, frozen, batch) -> state and metrics. The state is donated.

    Players are updated one after the other. Each sees the parameters that the players before it have updated.
    If a gradient is not finite, the update is skipped; only the step count advances.

    Args:
      stage: the stage to train.
      optimizers: one for each player (`optim.make_optimizers`).
      shardings: the state's shardings; gradients are reduced directly into the parameters' shards.
      mesh: the devices that hold the state.
      config: the run's configuration, of which this reads seed, ema_decay and grad_accumulation.
    """
    gradients = gradients_of(stage, config.grad_accumulation, mesh)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def update(state, frozen, batch):
        rng, metrics = step_rng(config.seed, state.step), {}
        several = len(stage.players) > 1
        for i, (player, optimizer, gradient) in enumerate(
            zip(stage.players, optimizers, gradients, strict=True)
        ):
            key = jax.random.fold_in(rng, i) if several else rng
            state, of_player = _move(state, player, optimizer, gradient, key, frozen, batch, shardings)
            metrics |= {f"{player.name}_{k}": v for k, v in of_player.items()} if several else of_player
        if several:
            # Records have these names whatever the number of players: they are the first player's.
            first = stage.players[0].name
            metrics |= {key: metrics[f"{first}_{key}"] for key in ("loss", "grad_norm", "learning_rate")}
            metrics["skipped"] = jnp.max(
                jnp.stack([metrics[f"{player.name}_skipped"] for player in stage.players])
            )
        decay = ema_decay_at(state.step, config.ema_decay)
        params = released(state.params, stage.players)
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema_params, params)
        ema = stage.players[0].project(ema, state.extra)
        # If an update was skipped, the average stays as it was, too.
        ema = jax.tree.map(
            lambda new, old: jnp.where(metrics["skipped"] > 0, old, new), ema, state.ema_params
        )
        return state.replace(step=state.step + 1, ema_params=ema), metrics

    return update


def _move(state, player, optimizer, gradient, key, frozen, batch, shardings):
    # Applies one player's update to the state; returns the state and the player's metrics.
    chosen = _chosen(state.params, player)
    fixed = {"fixed": {k: v for k, v in state.params.items() if k not in chosen}} if player.parameters else {}
    (loss, (metrics, extra)), grads = gradient(
        chosen, state.extra, key, batch, state.step, frozen=frozen, **fixed
    )
    grads = jax.lax.with_sharding_constraint(grads, _chosen(shardings.params, player))
    old_opt = state.opt_state[player.name] if player.name else state.opt_state
    rate = optimizer.learning_rate(updates_applied(old_opt))
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(norm)
    updates, opt_state = optimizer.tx.update(grads, old_opt, chosen)
    params = player.project(
        {**state.params, **optax.apply_updates(chosen, updates)}
        if player.parameters
        else optax.apply_updates(chosen, updates),
        extra,
    )

    def keep(new, old):
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    opt_state = keep(opt_state, old_opt)
    state = state.replace(
        params=keep(params, state.params),
        opt_state={**state.opt_state, player.name: opt_state} if player.name else opt_state,
        extra=keep(extra, state.extra),
    )
    return state, {"loss": loss, "learning_rate": rate, **metrics, "grad_norm": norm, "skipped": 1.0 - finite}
