"""From a source to batches, in an order that is a pure function of (seed, step).

Training visits positions p = 0, 1, 2, ...: step s of a global batch of B holds p = s B ... s B + B - 1. Position p is record
`permutation(p mod n)` of epoch p // n, so that every record comes once an epoch, in another order each time, and any step starts
without replaying the ones before it. Each host computes its own slice; the global batch does not depend on how many hosts there are.

The permutation is a Feistel network over [0, 4^h) with 4^h >= n, walked until it lands below n (cycle walking): a bijection that
needs no memory and is evaluated for any position alone.

A record that cannot be read is counted, logged, and replaced in its own slot by another one, chosen by (seed, p, attempt) alone:
nothing behind it shifts. Too many of them stop the run.

Two backends yield the same bytes: "tf" drives reading through `tf.data`; "numpy" uses a thread pool and needs no TensorFlow.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from unclip_jax.data.sources import Record, Source, import_tensorflow, one_line

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 8  # records tried for one slot
MIN_BAD = 8  # a run does not stop for fewer bad records than this
MAX_LOGGED = 20  # bad records logged one by one
BACKENDS = ("tf", "numpy")

# What damaged data raises. Anything else (TypeError, NameError, ...) is taken for a mistake in the program while the first batch is made.
DATA_ERRORS = (ValueError, OSError, KeyError, EOFError, MemoryError)

Example = dict[str, np.ndarray]
MakeExample = Callable[[Record, np.random.Generator], Example]

_ROUNDS = 6
_MIX_1, _MIX_2, _GOLDEN = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


class BadDataError(ValueError):
    """Too many records of a source cannot be used. The message is one line."""


@dataclasses.dataclass
class Stats:
    """Of the batches handed out so far, on this host: records `seen` (replacements included), how many of them were `bad`, and the seconds
    that the taker `waited` for batches."""

    seen: int = 0
    bad: int = 0
    waited: float = 0.0


# ----------------------------------------------------------------------------------------------------------------------
# Order
# ----------------------------------------------------------------------------------------------------------------------
def permutation(index: np.ndarray, n: int, seed: int, epoch: int | np.ndarray = 0, block: int | None = None) -> np.ndarray:
    """A pseudo-random bijection of [0, n), evaluated at `index`: int64 (...) in [0, n) -> int64 (...) in [0, n).

    Another one for every (seed, epoch); `epoch` is a number or an array of index's shape. With `block`, runs of `block` consecutive
    records stay together: the runs are permuted, and the records within each run. Use it where shards are remote and reading
    neighbours is cheap, with a block of many batches.

    Raises `ValueError` if n or block is below 1 or an index lies outside [0, n).
    """
    index = np.asarray(index, np.int64)
    if n < 1 or (block is not None and block < 1):
        raise ValueError(f"permutation needs n >= 1 and block >= 1, got n={n}, block={block}")
    if index.size and (index.min() < 0 or index.max() >= n):
        raise ValueError(f"permutation of [0, {n}): index outside")
    shape = np.broadcast_shapes(index.shape, np.shape(epoch))
    flat = np.broadcast_to(index, shape).reshape(-1)
    epochs = np.broadcast_to(np.asarray(epoch, np.int64), shape).reshape(-1)
    key = _mix(_mix(np.full(flat.shape, seed & _MASK, np.uint64)) + epochs.astype(np.uint64) * _GOLDEN)
    if block is None or block >= n:
        return _feistel(flat, n, key).reshape(shape)
    # `full` whole blocks and perhaps a short one, which stands at a random place among them.
    full, short = n // block, n % block
    place = (_mix(key + np.uint64(1)) % np.uint64(full + 1)).astype(np.int64) if short else np.full(flat.shape, full)
    start = place * block
    in_short = (flat >= start) & (flat < start + short)
    moved = np.where(flat >= start + short, flat - short, flat)  # positions as if the short block were not there
    moved = np.where(in_short, 0, moved)
    which = np.where(in_short, full, _feistel(moved // block, full, key))
    inner = _mix(key ^ _mix(which.astype(np.uint64) + np.uint64(2)))
    within = _feistel(moved % block, block, inner)
    if short:
        within = np.where(in_short, _feistel(np.where(in_short, flat - start, 0), short, inner), within)
    return (which * block + within).reshape(shape)


def _mix(x: np.ndarray) -> np.ndarray:
    # splitmix64's finaliser; uint64 arithmetic wraps.
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def _feistel(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    # One bijection of [0, n) per value of key; index int64 (N,), key uint64 (N,).
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


def global_indices(step: int, batch_size: int, n: int, seed: int, block: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The records of the global batch of `step`: (ids int64 (B,) in [0, n), epochs int64 (B,)). A pure function of its arguments."""
    positions = step * batch_size + np.arange(batch_size, dtype=np.int64)
    epochs = positions // n
    return permutation(positions % n, n, seed, epochs, block), epochs


def example_rng(seed: int, position: int, attempt: int = 0) -> np.random.Generator:
    """The randomness of one example (crop, caption, blur): a pure function of (seed, global position, attempt), on any host."""
    key = np.array([seed & _MASK, position & _MASK], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, attempt], np.uint64)))


def choose_caption(record: Record, rng: np.random.Generator) -> int:
    """The number of one of the record's captions that are not blank, uniformly. Raises `ValueError` if there is none."""
    captions = [i for i, caption in enumerate(record.captions) if caption.strip()]
    if not captions:
        raise ValueError("the record has no caption")
    return captions[int(rng.integers(len(captions)))]


# ----------------------------------------------------------------------------------------------------------------------
# One example
# ----------------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class _Bad:
    record: int
    where: str
    reason: str


@dataclasses.dataclass(frozen=True)
class _Order:
    """What decides which record stands at a position."""

    n: int
    seed: int
    block: int | None

    def records(self, positions: np.ndarray) -> np.ndarray:
        return permutation(positions % self.n, self.n, self.seed, positions // self.n, self.block)

    def replacement(self, position: int, attempt: int) -> int:
        # The same position under another permutation. It knows nothing of hosts, nor of the other slots.
        other = int(_mix(np.array([self.seed & _MASK], np.uint64) ^ np.uint64(attempt))[0])
        return int(permutation(np.array([position % self.n]), self.n, other, position // self.n)[0])


def _describe(record: Record | None, source: Source, i: int) -> str:
    if record is None:
        return f"record {i} of {source.name}"
    return f"record {record.key or i} of {record.shard}"


def _checked(example: Example, like: Example | None) -> Example:
    if not isinstance(example, dict):
        raise TypeError(f"make_example must return a dict of arrays, got {type(example).__name__}")
    arrays = {name: np.asarray(value) for name, value in example.items()}
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise TypeError(f"make_example returned {array.dtype} for {name!r}: batches hold numbers and booleans only")
    if like is not None:
        if arrays.keys() != like.keys():
            raise ValueError(f"make_example returned {sorted(arrays)}, for the first record {sorted(like)}")
        for name, array in arrays.items():
            if array.shape != like[name].shape or array.dtype != like[name].dtype:
                first = f"{like[name].dtype} {like[name].shape}"
                raise ValueError(f"make_example returned {array.dtype} {array.shape} for {name!r}, for the first record {first}")
    return arrays


def _make(
    source: Source, make_example: MakeExample, order: _Order, position: int, first: int, like: Example | None, strict: bool
) -> tuple[Example, list[_Bad]]:
    # Record `first`, or its replacements. `strict`: an error that is not the data's is raised as it is.
    bad: list[_Bad] = []
    for attempt in range(MAX_ATTEMPTS):
        i, record = order.replacement(position, attempt) if attempt else first, None
        try:
            record = source.read(i)
            return _checked(make_example(record, example_rng(order.seed, position, attempt)), like), bad
        except Exception as error:
            if strict and not isinstance(error, DATA_ERRORS):
                raise
            bad.append(_Bad(i, _describe(record, source, i), one_line(error)))
    raise BadDataError(
        f"{MAX_ATTEMPTS} records in a row of {source.name} cannot be used, the last is {bad[-1].where}: {bad[-1].reason}; "
        "mend the data, or filter such records out"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Training batches
# ----------------------------------------------------------------------------------------------------------------------
def train_batches(
    source: Source,
    make_example: MakeExample,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_steps: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    local_rows: np.ndarray | None = None,
    backend: str = "tf",
    block: int | None = None,
    max_bad_fraction: float = 0.01,
    num_workers: int | None = None,
    prefetch: int = 2,
) -> TrainBatches:
    """This host's rows of the global batches of steps start_step, start_step + 1, ...: an iterator of flat dicts of arrays.

    `make_example(record, rng) -> {name: array}` makes one row; it runs in several threads at once, takes all randomness from `rng`,
    and returns the same names, shapes and dtypes for every record. Each array of a batch holds the rows `local_rows` of the global batch of
    `batch_size`; without them its batch_size / process_count rows from process_index * that on. Ends after `num_steps` batches, never if
    None. `num_workers` threads (default: the number of cores, at most 32) keep `prefetch` batches ahead. The iterator has `.stats` and
    `.close()`.

    Both backends ("tf", "numpy") and any number of hosts give the same rows, and starting at step k equals skipping k batches.

    Raises `ValueError` at once for arguments that do not fit (a batch that the hosts cannot share equally, an unknown backend).
    While iterating, `BadDataError` with one line when more than `max_bad_fraction` of the records (and more than MIN_BAD, unless the
    fraction is 0) cannot be used, or when MAX_ATTEMPTS in a row cannot. An error in the first batch that is not the data's (a
    TypeError, say) is raised as it is.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown data backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise ValueError(f"batch_size={batch_size} cannot be shared equally by {process_count} host(s): choose a multiple of that")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} is outside [0, {process_count})")
    if start_step < 0 or (num_steps is not None and num_steps < 0):
        raise ValueError(f"start_step={start_step} and num_steps={num_steps} cannot be negative")
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction={max_bad_fraction} is a fraction in [0, 1]")
    if len(source) < 1:
        raise ValueError(f"{source.name} holds no records")
    order = _Order(len(source), seed, block)
    if local_rows is None:
        local_rows = np.arange(batch_size).reshape(process_count, -1)[process_index]
    rows = _Rows(batch_size, np.asarray(local_rows, np.int64), start_step, num_steps)
    workers = num_workers or min(32, os.cpu_count() or 1)
    return TrainBatches(source, make_example, order, rows, backend, max_bad_fraction, workers, max(1, prefetch))


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Which positions this host makes: `rows` of every global batch, from `start_step` on."""

    batch_size: int
    rows: np.ndarray
    start_step: int
    num_steps: int | None

    @property
    def local(self) -> int:
        return len(self.rows)

    def positions(self, step: int) -> np.ndarray:
        # Of the step-th batch after the start: int64 (local,).
        return (self.start_step + step) * self.batch_size + self.rows


class TrainBatches:
    """The iterator that `train_batches` returns. `stats` counts the records of the batches handed out; `close()` stops the workers."""

    def __init__(
        self,
        source: Source,
        make_example: MakeExample,
        order: _Order,
        rows: _Rows,
        backend: str,
        max_bad_fraction: float,
        workers: int,
        prefetch: int,
    ):
        self.stats = Stats()
        self._source, self._make_example, self._order, self._rows = source, make_example, order, rows
        self._max_bad_fraction, self._step = max_bad_fraction, 0
        self._like: Example | None = None
        self._records = functools.lru_cache(maxsize=prefetch + 8)(lambda step: order.records(rows.positions(step)))
        self._reports: dict[int, list[_Bad]] = {}  # k -> bad records met for the k-th example; taken when its batch is handed out
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        if rows.num_steps == 0:
            self._batches: Iterator[Example] = iter(())
            return
        self._like = self._make(0)[0]
        self._batches = (_tf_batches if backend == "tf" else _numpy_batches)(self._example, self._like, rows, workers, prefetch)

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Example:
        asked = time.perf_counter()
        try:
            batch = next(self._batches)
        except StopIteration:
            raise
        except BaseException as error:
            self.close()
            if self._failure is not None and isinstance(error, Exception):  # the worker's own error, not the backend's account of it
                raise self._failure from None
            raise
        self.stats.waited += time.perf_counter() - asked
        self._account()
        return batch

    def close(self) -> None:
        """Stop the workers; the iterator is at its end afterwards. Harmless to call twice."""
        closing = getattr(self._batches, "close", None)
        self._batches = iter(())
        if closing is not None:
            closing()

    def _make(self, k: int) -> tuple[Example, list[_Bad]]:
        # The host's k-th example and the bad records met on the way. The vectorised order is far cheaper than one record at a time.
        step, slot = divmod(k, self._rows.local)
        position, first = int(self._rows.positions(step)[slot]), int(self._records(step)[slot])
        return _make(self._source, self._make_example, self._order, position, first, self._like, strict=step == 0)

    def _example(self, k: int) -> Example:
        try:
            example, bad = self._make(k)
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            raise
        if bad:
            with self._lock:
                self._reports[k] = bad
        return example

    def _account(self) -> None:
        # In the order of the rows, whatever the order in which workers met them: the run stops at the same batch every time.
        first = self._step * self._rows.local
        self._step += 1
        last = None
        for k in range(first, first + self._rows.local):
            with self._lock:
                bad = self._reports.pop(k, [])
            self.stats.seen += 1 + len(bad)
            for last in bad:
                self.stats.bad += 1
                if self.stats.bad <= MAX_LOGGED:
                    more = "; further ones are counted but not logged" if self.stats.bad == MAX_LOGGED else ""
                    log.warning("skipped %s: %s%s", last.where, last.reason, more)
        bad, seen, allowed = self.stats.bad, self.stats.seen, self._max_bad_fraction
        if last is not None and bad > allowed * seen and (bad > MIN_BAD or allowed == 0):
            self.close()
            raise BadDataError(
                f"{bad} of {seen} records cannot be used, more than max_bad_fraction={allowed}; the last is {last.where}: {last.reason}; "
                "mend the data, or raise max_bad_fraction"
            )


def _numpy_batches(example: Callable[[int], Example], like: Example, rows: _Rows, workers: int, prefetch: int) -> Iterator[Example]:
    pool = ThreadPoolExecutor(workers, thread_name_prefix="unclip-data")
    waiting: collections.deque[list[Future]] = collections.deque()
    submitted = 0
    try:
        while rows.num_steps is None or submitted < rows.num_steps or waiting:
            while len(waiting) <= prefetch and (rows.num_steps is None or submitted < rows.num_steps):
                first = submitted * rows.local
                waiting.append([pool.submit(example, k) for k in range(first, first + rows.local)])
                submitted += 1
            examples = [future.result() for future in waiting.popleft()]
            yield {name: np.stack([row[name] for row in examples]) for name in like}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _tf_batches(example: Callable[[int], Example], like: Example, rows: _Rows, workers: int, prefetch: int) -> Iterator[Example]:
    tf = import_tensorflow("the 'tf' data backend (the 'numpy' one does not)")
    names = list(like)
    dtypes = [tf.as_dtype(like[name].dtype) for name in names]

    def values(k):
        row = example(int(k))
        return [row[name] for name in names]

    def make(k):
        arrays = tf.numpy_function(values, [k], dtypes)
        arrays = arrays if isinstance(arrays, (list, tuple)) else [arrays]
        for array, name in zip(arrays, names, strict=True):
            array.set_shape(like[name].shape)
        return dict(zip(names, arrays, strict=True))

    count = tf.int64.max if rows.num_steps is None else rows.num_steps * rows.local
    dataset = tf.data.Dataset.range(count)
    dataset = dataset.map(make, num_parallel_calls=workers, deterministic=True)
    dataset = dataset.batch(rows.local, drop_remainder=True).prefetch(prefetch)
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.private_threadpool_size = workers
    yield from dataset.with_options(options).as_numpy_iterator()


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation batches
# ----------------------------------------------------------------------------------------------------------------------
def eval_batches(
    source: Source,
    make_example: MakeExample,
    batch_size: int,
    limit: int | None = None,
    seed: int = 0,
    num_workers: int | None = None,
) -> Iterator[tuple[Example, int]]:
    """One pass in order over the first `limit` records (all if None): (batch, n_valid), every batch (batch_size, ...).

    The last batch is padded by repeating its rows; only the first `n_valid` rows count. Record i gets `example_rng(seed, i)`.

    Raises `ValueError` naming the record if one cannot be used: a figure is measured on all of the set or not at all.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    total = len(source) if limit is None else min(limit, len(source))
    like: Example | None = None

    def example(i: int) -> Example:
        record = None
        try:
            record = source.read(i)
            return _checked(make_example(record, example_rng(seed, i)), like)
        except DATA_ERRORS as error:
            raise ValueError(f"cannot evaluate on {_describe(record, source, i)}: {one_line(error)}; mend or filter it out") from error

    with ThreadPoolExecutor(num_workers or min(32, os.cpu_count() or 1), thread_name_prefix="unclip-data") as pool:
        for first in range(0, total, batch_size):
            rows = list(pool.map(example, range(first, min(first + batch_size, total))))
            like = rows[0]
            padded = [rows[i % len(rows)] for i in range(batch_size)]
            yield {name: np.stack([row[name] for row in padded]) for name in like}, len(rows)
