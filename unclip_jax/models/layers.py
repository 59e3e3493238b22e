"""Layers that the transformers and the U-Net share: attention, time embedding, normalisation, activations,
hooks.

Shape letters: B batch, L tokens, W width, K heads, C channels. Softmax and normalisation statistics are
float32 in every compute dtype.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.backend import platform_of
from unclip_jax.errors import InputError

Dtype = Any
Gather = Callable[[Any], Any]
REMAT_POLICIES = ("dots_saveable", "dots_with_no_batch_dims_saveable")


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x), the GELU approximation that OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x * Phi(x)."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Scaled dot-product attention. It uses cuDNN's fused kernel on NVIDIA GPUs, in half precision.

    Args:
      q: (B, Lq, K, D) queries.
      k: (B, Lk, K, D) keys.
      v: (B, Lk, K, D) values.
      mask: bool, broadcastable to (B, K, Lq, Lk); True where attention is allowed. Every row must allow at
        least one key: a row that allows none becomes the mean of the values.

    Returns:
      (B, Lq, K, D) in the dtype of `v`.
    """

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        logits = jnp.einsum(
            "bqkd,bpkd->bkqp", q * (q.shape[-1] ** -0.5), k, preferred_element_type=jnp.float32
        )
        if mask is not None:
            logits = jnp.where(mask, logits, -1e9)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        return jnp.einsum("bkqp,bpkd->bqkd", weights, v)

    def fused(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        # The gradient of cuDNN's kernel rejects masks of odd lengths. A row without use makes them even: a
        # key that is masked out, and a query whose result is dropped.
        length, (more_q, more_k) = q.shape[1], (q.shape[1] % 2, k.shape[1] % 2)
        full = mask
        if full is None and more_k:
            full = jnp.ones((1, 1, 1, 1), bool)
        if full is not None:
            full = jnp.broadcast_to(full, (*full.shape[:2], q.shape[1], k.shape[1]))
            full = jnp.pad(full, ((0, 0), (0, 0), (0, more_q), (0, 0)), mode="edge")
            full = jnp.pad(full, ((0, 0), (0, 0), (0, 0), (0, more_k)))
        longer = lambda x, more: jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) if more else x
        q, k, v = longer(q, more_q), longer(k, more_k), longer(v, more_k)
        return jax.nn.dot_product_attention(q, k, v, mask=full, implementation="cudnn")[:, :length]

    # Elsewhere, the gradient would carry the residuals of the branch that does not run.
    if v.dtype.itemsize == 2 and platform_of() == "gpu":
        try:
            jax.eval_shape(fused, q, k, v)
            return jax.lax.platform_dependent(q, k, v, cuda=fused, default=plain)
        except (ValueError, NotImplementedError, RuntimeError):  # no cuDNN, or unsupported sizes of heads
            pass
    return plain(q, k, v)


def timestep_embedding(t: jax.Array, width: int, max_period: float = 10_000.0) -> jax.Array:
    """Sinusoidal features of the time step: cosines, then sines, of t * max_period^(-i / half).

    Args:
      t: (B,) time steps, integer or fractional, in [0, T).
      width: number of features, even.
      max_period: the longest period, in steps.

    Returns:
      (B, width) float32 in [-1, 1].
    """
    half = width // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeMLP(nn.Module):
    """Sinusoid -> Dense -> SiLU -> Dense: the time embedding of the prior and of the U-Net.

    Attributes:
      features: width of the sinusoid.
      width: width of the result.
    """

    features: int
    width: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        """(B,) time steps -> (B, width)."""
        x = timestep_embedding(t, self.features).astype(self.dtype)
        x = nn.Dense(self.width, dtype=self.dtype, name="fc1")(x)
        return nn.Dense(self.width, dtype=self.dtype, name="fc2")(nn.silu(x))


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis with gain and bias, epsilon 1e-5, statistics in float32."""

    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., W) -> (..., W)."""
        return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, use_fast_variance=False, name="norm")(x)


def computed_once(module: nn.Module, name: str, compute: Callable[[], Any]) -> Any:
    """A value that all steps of a sampler share.

    It is read from the variable collection `fixed` if it is there, and computed otherwise. If the caller made
    the collection mutable, the computed value is stored in it: `apply(..., mutable=["fixed"])` fills the
    collection, and the caller passes it to later calls.

    Args:
      module: the module that owns the value.
      name: name of the value in the module.
      compute: computes the value, without arguments.
    """
    if module.has_variable("fixed", name):
        return module.get_variable("fixed", name)
    value = compute()
    if module.is_mutable_collection("fixed") and not module.is_initializing():
        module.put_variable("fixed", name, value)
    return value


_COUNTING = contextvars.ContextVar("counting", default=False)


@contextlib.contextmanager
def without_remat() -> Iterator[None]:
    """A context in which models are traced as if `remat` were "none".

    It serves to count the operations that a model itself needs.
    """
    token = _COUNTING.set(True)
    try:
        yield
    finally:
        _COUNTING.reset(token)


def checkpoint(function: Any, wrap: Callable[..., Any], remat: str) -> Any:
    """Applies `remat` to a function (or a module's class).

    Args:
      function: the function.
      wrap: makes the rematerialised function, with an optional `policy`.
      remat: "none" returns the function itself. "full" returns `wrap()`, which keeps only the arguments for
      the
        backward pass. The name of one of jax's policies (`REMAT_POLICIES`) returns `wrap(policy=...)`, which
        keeps more.

    Raises:
      ValueError: on another name.
    """
    if remat not in ("none", "full", *REMAT_POLICIES):
        raise InputError(f"unknown remat {remat!r}; choose none, full, {' or '.join(REMAT_POLICIES)}")
    if remat == "none" or _COUNTING.get():
        return function
    if remat == "full":
        return wrap()
    return wrap(policy=getattr(jax.checkpoint_policies, remat))


def with_hooks(
    module: nn.Module,
    block: type[nn.Module],
    gather: Gather | None,
    remat: str,
    static_argnums: tuple[int, ...] = (),
) -> type[nn.Module]:
    """Wraps a block class in the two hooks that act at block boundaries.

    Args:
      module: the module that uses the block.
      block: the linen class.
      gather: called on the block's parameter tree just before use (identity when None). It lets the caller
      gather
        sharded parameters block by block, while the model itself knows no mesh.
      remat: which of the block's activations the backward pass recomputes (`checkpoint`). The gathered
      parameters
        are inside the recomputed region, so the backward pass gathers them again.
      static_argnums: positions (self is 0) of `__call__` arguments that are Python values.

    Returns:
      A class with the same attributes, call signature and parameter names.
    """
    if gather is not None:
        init = module.is_initializing()
        block = nn.map_variables(block, "params", trans_in_fn=gather, init=init, mutable=init)
    wrap = functools.partial(nn.remat, block, static_argnums=static_argnums, prevent_cse=True)
    return checkpoint(block, wrap, remat)
