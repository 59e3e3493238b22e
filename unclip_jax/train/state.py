"""The training state: its creation on the mesh, and one update of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from unclip_jax.sharding import Mesh, infer_shardings


@flax.struct.dataclass
class TrainState:
    """All that training carries from step to step.

    step: () int32, batches seen; params, ema_params: float32 trees; opt_state: optax state, with its own count of applied updates.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any


def create_state(
    init: Callable[[jax.Array], Any], tx: optax.GradientTransformation, seed: int, mesh: Mesh
) -> tuple[TrainState, Any]:
    """Initialises the state under `jit`, already sharded: no host ever holds a whole model.

    Args:
      init: key -> parameter tree (jittable).
      tx: the optimizer.
      seed: of the initialisation.
      mesh: where the state lives.

    Returns:
      The state and its tree of shardings.
    """

    def create(key):
        params = init(key)
        # A real copy: the two trees are donated to the update separately.
        ema = jax.tree.map(lambda x: x + 0.0, params)
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, ema_params=ema, opt_state=tx.init(params))

    key = jax.random.key(seed)
    shardings = infer_shardings(jax.eval_shape(create, key), mesh)
    return jax.jit(create, out_shardings=shardings)(key), shardings


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
