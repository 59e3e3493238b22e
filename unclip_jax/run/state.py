"""The training state: its creation on the mesh, and one update of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from unclip_jax.sharding import Mesh, gather_rest, infer_shardings
from unclip_jax.train.optim import updates_applied


@flax.struct.dataclass
class TrainState:
    """All that training carries from step to step.

    step: () int32, batches seen; params, ema_params: float32 trees; opt_state: optax state, with its own count of applied updates.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any


def abstract_state(init: Callable[[jax.Array], Any], tx: optax.GradientTransformation, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """The state's shapes and its shardings on the mesh, without computing anything.

    Args:
      init: key -> parameter tree (jittable).
      tx: the optimizer.
      mesh: where the state shall live.
    """
    shapes = jax.eval_shape(functools.partial(_create, init, tx), jax.random.key(0))
    return shapes, infer_shardings(shapes, mesh)


def create_state(init: Callable[[jax.Array], Any], tx: optax.GradientTransformation, seed: int, shardings: TrainState) -> TrainState:
    """Initialises the state under `jit`, already sharded: no host ever holds a whole model. Arguments as those of `abstract_state`."""
    return jax.jit(functools.partial(_create, init, tx), out_shardings=shardings)(jax.random.key(seed))


def _create(init: Callable[[jax.Array], Any], tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    params = init(key)
    # A real copy: the two trees are donated to the update separately.
    ema = jax.tree.map(lambda x: x + 0.0, params)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, ema_params=ema, opt_state=tx.init(params))


def step_rng(seed: int, step: jax.Array) -> jax.Array:
    """The key of a step: fold_in(key(seed), step). It depends on nothing that came before."""
    return jax.random.fold_in(jax.random.key(seed), step)


def apply_gradients(
    state: TrainState, grads: Any, tx: optax.GradientTransformation, ema_decay: float
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update, skipped (but for the step count) when the gradient is not finite.

    The average's decay rises as (1 + n) / (10 + n) to `ema_decay`, so that early averages forget the initialisation.

    Returns:
      The new state and {grad_norm, skipped}.
    """
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(norm)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema_params, params)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)  # noqa: E731
    state = TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        ema_params=keep(ema, state.ema_params),
        opt_state=keep(opt_state, state.opt_state),
    )
    return state, {"grad_norm": norm, "skipped": 1.0 - finite}


Gradient = Callable[[Any, jax.Array, Any, Any], tuple[tuple[jax.Array, dict], Any]]


def accumulated(loss_of: Callable[..., tuple[jax.Array, dict]], count: int, mesh: Mesh) -> Gradient:
    """(params, rng, frozen, batch) -> ((loss, metrics), gradient), the means over `count` parts of the batch, computed one after the other.

    Args:
      loss_of: (params, rng, batch, frozen=) -> loss () and metrics, both means over the batch's rows.
      count: of the parts; it divides the rows on each device. Part i holds every count-th row and has a key of its own.
      mesh: where the parameters lie; those outside of blocks are gathered before use (`sharding.gather_rest`).

    Raises:
      ValueError: when count is less than 1.
    """
    if count < 1:
        raise ValueError(f"grad_accumulation must be at least 1, got {count}")
    gradient_of = jax.value_and_grad(lambda params, *args, **kwargs: loss_of(gather_rest(params, mesh), *args, **kwargs), has_aux=True)

    def gradient(params, rng, frozen, batch):
        if count == 1:
            return gradient_of(params, rng, batch, frozen=frozen)
        rows = len(jax.tree.leaves(batch)[0])
        if rows % count:
            raise ValueError(f"grad_accumulation {count} does not divide the batch of {rows}")
        # Strided, so that the rows of every device are spread over all parts and none has to move.
        parts = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(rows // count, count, *a.shape[1:]), 1, 0), batch)

        def add(total, item):
            i, part = item
            return jax.tree.map(jnp.add, total, gradient_of(params, jax.random.fold_in(rng, i), part, frozen=frozen)), None

        one = jax.eval_shape(lambda: gradient_of(params, rng, jax.tree.map(lambda a: a[0], parts), frozen=frozen))
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), one)
        total, _ = jax.lax.scan(add, zeros, (jnp.arange(count), parts))
        return jax.tree.map(lambda a: a / count, total)

    return gradient


def make_update(
    gradient: Gradient,
    optimizer: tuple[optax.GradientTransformation, optax.Schedule],
    shardings: TrainState,
    *,
    seed: int,
    ema_decay: float,
    project: Callable[[Any], Any] = lambda params: params,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted update step: (state, frozen, batch) -> state and metrics. The state is donated.

    Args:
      gradient: see `accumulated`; its gradient is reduced straight into the parameters' shards.
      optimizer: transformation and learning rate (`make_optimizer`).
      shardings: of the state.
      seed: of the run; the step's key is `step_rng(seed, step)`.
      ema_decay: see `apply_gradients`.
      project: keeps parameters where they belong, after the update.
    """
    tx, learning_rate = optimizer

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def update(state, frozen, batch):
        (loss, metrics), grads = gradient(state.params, step_rng(seed, state.step), frozen, batch)
        grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        rate = learning_rate(updates_applied(state.opt_state))
        state, update_metrics = apply_gradients(state, grads, tx, ema_decay)
        state = state.replace(params=project(state.params), ema_params=project(state.ema_params))
        return state, {"loss": loss, "learning_rate": rate, **metrics, **update_metrics}

    return update
