"""From a source to batches, in an order that is a pure function of (seed, step).

Step s of a global batch of B rows holds the positions s B ... s B + B - 1 of the order (`data.order`). Each
host computes its own rows, and the global batch does not depend on how many hosts there are. Any step starts
without replaying the ones before it.

A record that cannot be read is counted, logged, and replaced in its own slot by another record. The
replacement depends on (seed, position, attempt) alone, so that nothing behind it shifts. Too many bad records
stop the run.

Two backends yield the same bytes: "tf" drives the reading through `tf.data`; "numpy" uses a pool of threads
and does not need TensorFlow.
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

from unclip_jax.data.order import Order, example_rng
from unclip_jax.data.record import Record, Source, error_summary
from unclip_jax.data.tensorflow import import_tensorflow
from unclip_jax.errors import InputError

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 8  # records tried for one slot
MIN_BAD = 8  # a run does not stop for fewer bad records than this
MAX_LOGGED = 20  # bad records logged one by one
BACKENDS = ("tf", "numpy")

# The errors that damaged data raises. While the first batch is made, any other error, such as a TypeError, is
# taken for a mistake in the program.
DATA_ERRORS = (ValueError, OSError, KeyError, EOFError, MemoryError)

Example = dict[str, np.ndarray]
MakeExample = Callable[[Record, np.random.Generator], Example]


class BadDataError(InputError):
    """Too many records of a source cannot be used. The message is one line."""


@dataclasses.dataclass
class Stats:
    """Counts of the batches handed out so far on this host.

    Attributes:
      seen: records read, including the replacements of bad ones.
      bad: how many of them could not be used.
      full: captions that fill all tokens of a text encoder; all but a few of them were cut.
      waited: seconds that the caller waited for batches.
    """

    seen: int = 0
    bad: int = 0
    full: int = 0
    waited: float = 0.0


@dataclasses.dataclass(frozen=True)
class Workers:
    """How batches are made. None of this changes what they hold.

    Attributes:
      backend: "tf" or "numpy".
      threads: how many threads make rows; None means one per core, at most 32.
      prefetch: how many batches are kept ready ahead of the caller, at least 1.

    Raises `ValueError` for an unknown backend.
    """

    backend: str = "tf"
    threads: int | None = None
    prefetch: int = 2

    def __post_init__(self):
        if self.backend not in BACKENDS:
            raise InputError(f"unknown data backend {self.backend!r}: choose one of {', '.join(BACKENDS)}")


# ------------------------------------------------------------------------------------------------------------
# One example
# ------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class _Bad:
    """A record that could not be used: what messages call it, and why."""

    where: str
    reason: str


def _where(record: Record | None, source: Source, i: int) -> str:
    if record is None:
        return f"record {i} of {source.name}"
    return f"record {record.key or i} of {record.shard}"


def _checked(example: Example, like: Example | None) -> Example:
    if not isinstance(example, dict):
        raise TypeError(f"make_example must return a dict of arrays, got {type(example).__name__}")
    arrays = {name: np.asarray(value) for name, value in example.items()}
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise TypeError(
                f"make_example returned {array.dtype} for {name!r}: batches hold numbers and booleans only"
            )
    if like is not None:
        if arrays.keys() != like.keys():
            raise InputError(f"make_example returned {sorted(arrays)}, for the first record {sorted(like)}")
        for name, array in arrays.items():
            first = like[name]
            if array.shape != first.shape or array.dtype != first.dtype:
                given, expected = f"{array.dtype} {array.shape}", f"{first.dtype} {first.shape}"
                raise InputError(
                    f"make_example returned {given} for {name!r}, for the first record {expected}"
                )
    return arrays


def _make_row(
    source: Source,
    make_example: MakeExample,
    order: Order,
    position: int,
    first: int,
    like: Example | None,
    strict: bool,
) -> tuple[Example, list[_Bad]]:
    # The row of record `first`, or of the first of its replacements that can be used, and the bad records
    # before it. With `strict`, an error that is not one of DATA_ERRORS is raised unchanged.
    bad: list[_Bad] = []
    for attempt in range(MAX_ATTEMPTS):
        i, record = order.replacement(position, attempt) if attempt else first, None
        try:
            record = source.read(i)
            return _checked(make_example(record, example_rng(order.seed, position, attempt)), like), bad
        except Exception as error:
            if strict and not isinstance(error, DATA_ERRORS):
                raise
            bad.append(_Bad(_where(record, source, i), error_summary(error)))
    raise BadDataError(
        f"{MAX_ATTEMPTS} records in a row of {source.name} cannot be used, "
        f"the last is {bad[-1].where}: {bad[-1].reason}; mend the data, or filter such records out"
    )


# ------------------------------------------------------------------------------------------------------------
# Training batches
# ------------------------------------------------------------------------------------------------------------
def train_batches(
    source: Source,
    make_example: MakeExample,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_steps: int | None = None,
    local_rows: np.ndarray | None = None,
    max_bad_fraction: float = 0.01,
    workers: Workers | None = None,
) -> TrainBatches:
    """This host's rows of the global batches of steps start_step, start_step + 1, ...

    Both backends and any number of hosts give the same rows. Starting at step k equals skipping k batches.

    Args:
      source: the records.
      make_example: (record, rng) -> {name: array}, one row. It runs in several threads at once, takes all
        randomness from `rng`, and returns the same names, shapes and dtypes for every record.
      batch_size: rows of the global batch.
      seed: decides the order and the randomness of every row.
      start_step: the step of the first batch.
      num_steps: how many batches there are; None for no end.
      local_rows: int (rows,), which rows of every global batch this host makes; None for all of them.
      max_bad_fraction: the fraction of records, in [0, 1], that may be unusable.
      workers: how the batches are made; None for the defaults of `Workers`.

    Returns:
      An iterator of flat dicts of arrays (rows, ...). It also has `.stats` and `.close()`.

    Raises:
      ValueError: at once, for arguments that do not fit.
      BadDataError: while iterating, with one line: when more than `max_bad_fraction` of the records cannot be
        used (and more than MIN_BAD, unless the fraction is 0), or when MAX_ATTEMPTS records in a row cannot
        be used. An error in the first batch that is not one of DATA_ERRORS (a TypeError, for example) is
        raised unchanged.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} must be at least 1")
    local_rows = np.arange(batch_size) if local_rows is None else np.asarray(local_rows, np.int64)
    if not len(local_rows) or local_rows.min() < 0 or local_rows.max() >= batch_size:
        raise InputError(f"local_rows={local_rows} must be rows of a global batch of {batch_size}")
    if start_step < 0 or (num_steps is not None and num_steps < 0):
        raise InputError(f"start_step={start_step} and num_steps={num_steps} cannot be negative")
    if not 0 <= max_bad_fraction <= 1:
        raise InputError(f"max_bad_fraction={max_bad_fraction} must be a fraction in [0, 1]")
    if len(source) < 1:
        raise InputError(f"{source.name} holds no records")
    rows = _Rows(batch_size, local_rows, start_step, num_steps)
    return TrainBatches(
        source, make_example, Order(len(source), seed), rows, max_bad_fraction, workers or Workers()
    )


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Which positions this host makes: `rows` of every global batch, from `start_step` on."""

    batch_size: int
    rows: np.ndarray
    start_step: int
    num_steps: int | None

    @property
    def count(self) -> int:
        return len(self.rows)

    def positions(self, step: int) -> np.ndarray:
        # Of the step-th batch after the start: int64 (count,).
        return (self.start_step + step) * self.batch_size + self.rows


class TrainBatches:
    """The iterator that `train_batches` returns.

    `stats` counts the records of the batches handed out so far; `close()` stops the workers.
    """

    def __init__(
        self,
        source: Source,
        make_example: MakeExample,
        order: Order,
        rows: _Rows,
        max_bad_fraction: float,
        workers: Workers,
    ):
        self.stats = Stats()
        self._source, self._make_example, self._order, self._rows = source, make_example, order, rows
        self._max_bad_fraction, self._step = max_bad_fraction, 0
        self._like: Example | None = None
        prefetch = max(1, workers.prefetch)
        # The order is computed for a whole batch at once, which is far cheaper than record by record.
        self._records = functools.lru_cache(maxsize=prefetch + 8)(
            lambda step: order.records(rows.positions(step))
        )
        # k -> the bad records met for the k-th example of this host; removed when its batch is handed out.
        self._reports: dict[int, list[_Bad]] = {}
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        if rows.num_steps == 0:
            self._batches: Iterator[Example] = iter(())
            return
        self._like = self._make(0)[0]
        make_batches = _tf_batches if workers.backend == "tf" else _numpy_batches
        threads = workers.threads or min(32, os.cpu_count() or 1)
        self._batches = make_batches(self._example, self._like, rows, threads, prefetch)

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
            if self._failure is not None and isinstance(error, Exception):
                raise self._failure from None  # the worker's own error, not the backend's report of it
            raise
        self.stats.waited += time.perf_counter() - asked
        self._account()
        masks = [batch[name][:, -1] for name in ("clip_token_mask", "token_mask") if name in batch]
        self.stats.full += int(np.any(masks, axis=0).sum()) if masks else 0
        return batch

    def close(self) -> None:
        """Stops the workers and ends the iterator. A second call does nothing."""
        closing = getattr(self._batches, "close", None)
        self._batches = iter(())
        if closing is not None:
            closing()

    def _make(self, k: int) -> tuple[Example, list[_Bad]]:
        # The k-th example of this host and the bad records met on the way.
        step, slot = divmod(k, self._rows.count)
        position, first = int(self._rows.positions(step)[slot]), int(self._records(step)[slot])
        strict = step == 0
        return _make_row(self._source, self._make_example, self._order, position, first, self._like, strict)

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
        # Bad records are counted in the order of the rows, not in the order in which the workers met them. So
        # the run stops at the same batch every time.
        first = self._step * self._rows.count
        self._step += 1
        last = None
        for k in range(first, first + self._rows.count):
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
                f"{bad} of {seen} records cannot be used, more than max_bad_fraction={allowed}; "
                f"the last is {last.where}: {last.reason}; mend the data, or raise max_bad_fraction"
            )


def _numpy_batches(
    example: Callable[[int], Example], like: Example, rows: _Rows, threads: int, prefetch: int
) -> Iterator[Example]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="unclip-data")
    waiting: collections.deque[list[Future]] = collections.deque()
    submitted = 0
    try:
        while rows.num_steps is None or submitted < rows.num_steps or waiting:
            while len(waiting) <= prefetch and (rows.num_steps is None or submitted < rows.num_steps):
                first = submitted * rows.count
                waiting.append([pool.submit(example, k) for k in range(first, first + rows.count)])
                submitted += 1
            examples = [future.result() for future in waiting.popleft()]
            yield {name: np.stack([row[name] for row in examples]) for name in like}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _tf_batches(
    example: Callable[[int], Example], like: Example, rows: _Rows, threads: int, prefetch: int
) -> Iterator[Example]:
    tf = import_tensorflow("the data backend 'tf' (unlike 'numpy')")
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

    count = tf.int64.max if rows.num_steps is None else rows.num_steps * rows.count
    dataset = tf.data.Dataset.range(count)
    dataset = dataset.map(make, num_parallel_calls=threads, deterministic=True)
    dataset = dataset.batch(rows.count, drop_remainder=True).prefetch(prefetch)
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.private_threadpool_size = threads
    yield from dataset.with_options(options).as_numpy_iterator()


# ------------------------------------------------------------------------------------------------------------
# Evaluation batches
# ------------------------------------------------------------------------------------------------------------
def eval_batches(
    source: Source,
    make_example: MakeExample,
    batch_size: int,
    limit: int | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> Iterator[tuple[Example, int]]:
    """One pass over the first records of a source, in their order: pairs of (batch, n_valid).

    Every batch holds arrays (batch_size, ...). The last batch is padded by repeating its rows: only its first
    `n_valid` rows count.

    Args:
      source: the records.
      make_example: (record, rng) -> {name: array}, one row; record i gets `example_rng(seed, i)`.
      batch_size: rows of each batch.
      limit: how many records to read; None for all.
      seed: decides the randomness of every row.
      threads: how many threads make rows; None means one per core, at most 32.

    Raises `ValueError` naming the record if one cannot be used: figures are measured on all records.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} must be at least 1")
    total = len(source) if limit is None else min(limit, len(source))
    like: Example | None = None

    def example(i: int) -> Example:
        record = None
        try:
            record = source.read(i)
            return _checked(make_example(record, example_rng(seed, i)), like)
        except DATA_ERRORS as error:
            reason = f"{_where(record, source, i)}: {error_summary(error)}"
            raise InputError(f"cannot evaluate on {reason}; mend or filter it out") from error

    threads = threads or min(32, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="unclip-data") as pool:
        for first in range(0, total, batch_size):
            rows = list(pool.map(example, range(first, min(first + batch_size, total))))
            like = rows[0]
            padded = [rows[i % len(rows)] for i in range(batch_size)]
            yield {name: np.stack([row[name] for row in padded]) for name in like}, len(rows)
