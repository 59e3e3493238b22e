"""The order of training: which record stands at which position, as a pure function of (seed, position).

Training visits positions p = 0, 1, 2, ... Position p of a source of n records shows record `permutation(p mod
n)` of epoch p // n. So every record comes once in an epoch, in another order each time, and any position is
computed alone.

The permutation is a Feistel network over [0, 4^h) with 4^h >= n. It is applied again until the result lies
below n (cycle walking). The result is a bijection that needs no memory.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from unclip_jax.errors import InputError

_ROUNDS = 6
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


@dataclasses.dataclass(frozen=True)
class Order:
    """The order in which training visits the `n` records of a source."""

    n: int
    seed: int

    def records(self, positions: np.ndarray) -> np.ndarray:
        """The record at each position: int64 (...), any number from 0 on -> int64 (...) in [0, n)."""
        return permutation(positions % self.n, self.n, self.seed, positions // self.n)

    def replacement(self, position: int, attempt: int) -> int:
        """The record to try at a position after `attempt` bad ones: that position under another permutation.

        It depends on (seed, position, attempt) alone: not on the number of hosts or on other positions.
        """
        other_seed = int(_mix(np.array([self.seed & _MASK], np.uint64) ^ np.uint64(attempt))[0])
        return int(permutation(np.array([position % self.n]), self.n, other_seed, position // self.n)[0])


def permutation(index: np.ndarray, n: int, seed: int, epoch: int | np.ndarray = 0) -> np.ndarray:
    """A pseudo-random bijection of [0, n), evaluated at `index`: int64 (...) in [0, n).

    Args:
      index: where to evaluate it, int64 (...) in [0, n).
      n: how many records there are.
      seed: any integer; every (seed, epoch) gives another bijection.
      epoch: a number from 0 on, or an array of the shape of `index`.

    Raises `ValueError` if n is below 1 or an index lies outside [0, n).
    """
    index = np.asarray(index, np.int64)
    if n < 1:
        raise InputError(f"permutation needs n >= 1, got n={n}")
    if index.size and (index.min() < 0 or index.max() >= n):
        raise InputError(f"permutation of [0, {n}): an index is outside")
    shape = np.broadcast_shapes(index.shape, np.shape(epoch))
    flat = np.broadcast_to(index, shape).reshape(-1)
    epochs = np.broadcast_to(np.asarray(epoch, np.int64), shape).reshape(-1)
    key = _mix(_mix(np.full(flat.shape, seed & _MASK, np.uint64)) + epochs.astype(np.uint64) * _GOLDEN)
    return _feistel(flat, n, key).reshape(shape)


def example_rng(seed: int, position: int, attempt: int = 0) -> np.random.Generator:
    """The randomness of one example (its crop, caption, blur): a pure function of (seed, position, attempt).

    `position` counts over global batches, `attempt` over the records tried at that position.
    """
    key = np.array([seed & _MASK, position & _MASK], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, attempt], np.uint64)))


def _mix(x: np.ndarray) -> np.ndarray:
    # The finaliser of splitmix64. Arithmetic of uint64 wraps around.
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def _feistel(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    # One bijection of [0, n) for each value of key; index int64 (N,), key uint64 (N,).
    half = max(1, -(-(n - 1).bit_length() // 2))
    shift, low = np.uint64(half), np.uint64((1 << half) - 1)
    values = index.astype(np.uint64)
    pending = np.arange(len(values))
    while len(pending):
        left, right, keys = values[pending] >> shift, values[pending] & low, key[pending]
        for i in range(_ROUNDS):
            left, right = right, left ^ (_mix(right ^ _mix(keys + np.uint64(i))) & low)
        walked = left << shift | right
        values[pending] = walked
        pending = pending[walked >= n]
    return values.astype(np.int64)
