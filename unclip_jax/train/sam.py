"""Sharpness-aware minimisation (SAM) of a contrastive loss (Foret et al. 2021; unCLIP appendix C).

The paper uses rho 0.1 for each replica of 64 images. Let F be the features of the whole batch, split into
groups r of `group_size` consecutive rows, and let L be their loss:

    g_r = dL/dw through the features of group r alone; the features of the other groups are constants
    e_r = rho g_r / |g_r|
    F'  = the features of every group r at w + e_r
    update direction = sum over r of dL(F')/dw through the features of group r, at w + e_r

Only the second gradient is summed over the groups. L also depends on the temperature directly: each group
contributes 1 / groups of that gradient, so that with rho 0 the sum is the plain gradient. The groups do not
depend on the mesh. Every group evaluates the loss of the whole batch: B^2 D operations for each of the B /
group_size groups, which is little compared with large towers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unclip_jax.errors import InputError

Features = Any


def sam_gradient(
    embed: Callable[[Any, Any], Features],
    loss: Callable[[Any, Features], tuple[jax.Array, dict]],
    params: Any,
    batch: Any,
    *,
    rho: float,
    group_size: int,
    lanes: int = 1,
) -> tuple[tuple[jax.Array, dict], Any]:
    """The loss at the unperturbed weights, and SAM's gradient.

    Args:
      embed: (params, rows of the batch) -> tree of features, rows first; it must treat rows independently.
      loss: (params, features of the whole batch) -> loss () and metrics.
      params: tree of arrays.
      batch: tree of arrays with B rows each.
      rho: length of the perturbation.
      group_size: rows per group; B must be a multiple of it.
      lanes: number of groups computed at once, each with its own copy of the parameters: the
        number of shards of the batch. It does not change the result.

    Returns:
      ((loss, metrics), gradient), as `jax.value_and_grad(..., has_aux=True)` returns them.

    Raises:
      ValueError: when the batch does not divide into groups, or the groups into lanes.
    """
    rows = len(jax.tree.leaves(batch)[0])
    count = rows // group_size
    if rows % group_size or count % lanes:
        raise InputError(
            f"a batch of {rows} rows does not divide into groups of {group_size} in {lanes} lanes"
        )
    per_lane = count // lanes
    # A lane holds consecutive rows, like a shard of the batch. The loop runs over the groups of a lane, with
    # all lanes at once.
    split = lambda a: jnp.moveaxis(a.reshape(lanes, per_lane, group_size, *a.shape[1:]), 1, 0)
    join = lambda a: jnp.moveaxis(a, 0, 1).reshape(rows, *a.shape[3:])
    groups = jax.tree.map(split, batch)
    first_rows = split(jnp.arange(rows))[:, :, 0]

    def direct(p):  # the same values, with 1 / count of the gradient
        return jax.tree.map(lambda x: x / count + jax.lax.stop_gradient(x - x / count), p)

    def gradient(p, first, group, others):
        def through_group(p):
            group_features = embed(p, group)
            features = jax.tree.map(
                lambda o, f: jax.lax.dynamic_update_slice_in_dim(jax.lax.stop_gradient(o), f, first, axis=0),
                others,
                group_features,
            )
            return loss(direct(p), features)

        return jax.value_and_grad(through_group, has_aux=True)(p)

    def perturbed(first, group, others):
        g = gradient(params, first, group, others)[1]
        norm = optax.global_norm(g)
        step = rho / jnp.where(norm > 0, norm, 1.0)
        return jax.tree.map(lambda p, g: p + step * g, params, g)

    plain = jax.tree.map(join, jax.lax.map(jax.vmap(lambda group: embed(params, group)), groups))

    def at_own_weights(item):
        return jax.vmap(lambda first, group: embed(perturbed(first, group, plain), group))(*item)

    moved = jax.tree.map(join, jax.lax.map(at_own_weights, (first_rows, groups)))

    def add(total, item):
        one = lambda first, group: gradient(perturbed(first, group, plain), first, group, moved)[1]
        return jax.tree.map(lambda t, g: t + jnp.sum(g, axis=0), total, jax.vmap(one)(*item)), None

    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (first_rows, groups))
    return loss(params, plain), total
