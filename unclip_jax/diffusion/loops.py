"""How a sampler's steps are run: all in one scan, or in segments that show what comes about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.diffusion.guidance import Denoise, Denoised

# Runs (body, init, xs) -> carry: the steps of a sampler, as `lax.scan` takes them.
Loop = Callable[[Callable, Any, Any], Any]


def scan(body: Callable, init: Any, xs: Any) -> Any:
    """All steps in one `lax.scan`; returns the last carry."""
    return jax.lax.scan(body, init, xs)[0]


class Segment:
    """Runs the steps of segment k of K in place of all steps, for pictures that are shown on the way.

    The segments of a sampler, one after another, make the same steps as `scan`. One program runs every
    segment, since k and K may be traced. Use each object for one call of a sampler:

        segment = Segment(k, count, carry)
        out = ddpm(segment.watch(denoise), x, ..., loop=segment)

    Args:
      k, count: () the segment's number from 0, and the number of segments.
      carry: what the segment before left; None before the first one, which then makes no step.

    Attributes, after the call:
      carry: what the next segment starts from.
      x0: the last prediction of the clean sample. Only after the last segment is the sampler's own result
        the sample.
    """

    def __init__(self, k: jax.Array | int, count: jax.Array | int, carry: Any = None):
        self._k, self._count, self._given = k, count, carry
        self._seen: jax.Array | None = None
        self.carry = self.x0 = None

    def watch(self, denoise: Denoise) -> Denoise:
        """The denoiser, whose x0 this object then sees."""

        def watched(x_t: jax.Array, t: jax.Array) -> Denoised:
            out = denoise(x_t, t)
            self._seen = out.x0
            return out

        return watched

    def __call__(self, body: Callable, init: Any, xs: Any) -> Any:
        """Runs the segment's steps; returns the carry after them."""
        if self._given is None:
            self.carry = init
            return init
        count = len(jax.tree.leaves(xs)[0])
        first, last = self._k * count // self._count, (self._k + 1) * count // self._count

        def step(i, state):
            carry, _ = body(state[0], jax.tree.map(lambda a: a[i], xs))
            return carry, self._seen

        x = jax.tree.leaves(init)[0]
        self.carry, self.x0 = jax.lax.fori_loop(first, last, step, (self._given, jnp.zeros_like(x)))
        return self.carry
