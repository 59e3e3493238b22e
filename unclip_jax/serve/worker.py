"""The one owner of the devices: a queue of jobs, batches of rows that belong together, and their programs.

A job asks for rows (pictures). Jobs of the same key use the same program, so that rows of several jobs are
drawn in one batch. Two threads work: one draws, and the other one compiles, so that a request with new
settings makes nobody wait. A batch has one of the sizes whose programs are compiled.

Fairness: a batch takes one row of each job in turn. A job with rows left goes to the end of the queue.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any, NamedTuple

from unclip_jax.errors import InputError, NumericalError, one_line
from unclip_jax.sampling.programs import Sampler
from unclip_jax.serve.errors import ApiError
from unclip_jax.serve.settings import Settings
from unclip_jax.serve.telemetry import LOG, Telemetry

OTHERS = 32  # keys that were not announced, whose programs are kept


class Shown(NamedTuple):
    """What is shown of a batch on the way: one thing per row."""

    results: list[Any]


class Task(NamedTuple):
    """What to draw.

    sampler: the bundle's.
    key: tasks of equal keys are drawn by the same programs.
    rows: what `draw` needs for each picture.
    draw: rows -> one result per row; or a generator of `Shown` and then of the results. It gets a power of
      two of rows per device. The rows of a batch may come from several tasks.
    model, verb: for metrics.
    together: tasks of equal keys share a batch only if this is equal, too.
    shows: count -> the same task, which shows each picture so many times on the way; None if it cannot.
    """

    sampler: Sampler
    key: Hashable
    rows: Sequence[Any]
    draw: Callable[[list[Any]], list[Any] | Iterator[Shown | list[Any]]]
    model: str = ""
    verb: str = ""
    together: Hashable = None
    shows: Callable[[int], Task] | None = None


class Job:
    """A task in the queue. `future` gets the list of its results, or the error.

    show: called with (row, what is shown of it) from the thread that draws.
    """

    def __init__(self, task: Task, deadline: float, show: Callable[[int, Any], None] | None = None):
        self.task, self.deadline, self.arrived = task, deadline, time.monotonic()
        self.show = show
        self.results: list[Any] = [None] * len(task.rows)
        self.taken = self.done = 0
        self.future: Future = Future()

    @property
    def left(self) -> int:
        """Rows that no batch has taken."""
        return len(self.results) - self.taken


class Worker:
    """Draws the jobs of a server.

    Args:
      settings: batch, queue, wait, deadline.
      telemetry: where batches are counted.
      announced: groups of tasks of one row each, whose programs are compiled before anything asks for them.
        Within a group, small sizes of all tasks come before large ones. The worker is ready when the smallest
        size of the very first task is compiled.
    """

    def __init__(self, settings: Settings, telemetry: Telemetry, announced: Sequence[Sequence[Task]] = ()):
        self.settings, self.telemetry = settings, telemetry
        self._condition = threading.Condition()
        self._queue: deque[Job] = deque()
        self._sizes: dict[Hashable, list[int]] = {}  # key -> sizes that are compiled, ascending
        self._others: OrderedDict[Hashable, tuple[Sampler, set[Hashable]]] = OrderedDict()
        self._kept: set[Hashable] = set()  # programs of announced keys
        self._asked: deque[tuple[Task, int]] = deque()  # to compile, by requests
        self._announced: deque[tuple[Task, int]] = deque()
        tasks = [task for group in announced for task in group]
        self._first = tasks[0].key if tasks else None
        self._announced_keys = {task.key for task in tasks}
        for group in announced:
            sized = [
                (i, size, task) for task in group for i, size in enumerate(self.batch_sizes(task.sampler))
            ]
            for _, size, task in sorted(sized, key=lambda row: row[0]):
                self._announced.append((task, size))
        self._compiling: tuple[Hashable, int] | None = None
        self._seconds_per_row = 1.0
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._draw_all, name="draw", daemon=True),
            threading.Thread(target=self._compile_all, name="compile", daemon=True),
        ]

    # -------------------------------------------------------------------------------------------- outside
    def start(self) -> None:
        """Starts both threads."""
        for thread in self._threads:
            thread.start()

    def stop(self, seconds: float = 0.0) -> None:
        """Waits until the queue is empty, at most `seconds`, and ends the threads. What is left fails."""
        with self._condition:
            self._condition.wait_for(lambda: not self._queue, seconds)
            self._stopping = True
            for job in self._queue:
                _fail(job, ApiError(503, "the server stops; try again", code="stopping", retry_after=5))
            self._queue.clear()
            self._condition.notify_all()
        self._threads[0].join(5.0)

    def batch_sizes(self, sampler: Sampler) -> list[int]:
        """The sizes of batches on the sampler's mesh, ascending."""
        ways = sampler.mesh.shape["data"] * sampler.mesh.shape["fsdp"]
        on_cpu = sampler.mesh.devices.flat[0].platform == "cpu"
        limit = self.settings.batch or (4 if on_cpu else 16)
        return [ways << i for i in range(limit.bit_length())]

    @property
    def ready(self) -> bool:
        """Whether pictures can be drawn without compilation."""
        return self._first is None or bool(self._sizes.get(self._first))

    def compiled_sizes(self, key: Hashable) -> list[int]:
        """The sizes of batches whose programs are compiled for a key."""
        return list(self._sizes.get(key, ()))

    def compiling(self) -> int:
        """The number of announced programs that are not compiled yet."""
        with self._condition:
            busy = self._compiling is not None and self._compiling[0] in self._announced_keys
            return len(self._announced) + busy

    def submit(self, task: Task, show: Callable[[int, Any], None] | None = None) -> Job:
        """Puts a task into the queue. `show` is that of `Job`.

        Raises:
          ApiError: 429 when the queue is full; 503 when the server stops.
        """
        job = Job(task, time.monotonic() + self.settings.deadline, show)
        with self._condition:
            if self._stopping:
                raise ApiError(503, "the server stops; try again", code="stopping", retry_after=5)
            waiting = self._waiting()
            if waiting + len(task.rows) > self.settings.queue:
                seconds = max(1, min(600, math.ceil(waiting * self._seconds_per_row)))
                raise ApiError(
                    429, f"{waiting} pictures wait already; try again in {seconds} s", retry_after=seconds
                )
            self._queue.append(job)
            self._count()
            self._condition.notify_all()
        return job

    def prepare(self, task: Task) -> None:
        """Compiles the programs of a task that may be asked for later."""
        with self._condition:
            if not self._sizes.get(task.key):
                self._ask(task, len(task.rows))

    def cancel(self, job: Job) -> None:
        """Drops a job whose client has gone. Rows that are being drawn are drawn, for nobody."""
        with self._condition:
            if job in self._queue:
                self._queue.remove(job)
            job.future.cancel()
            self._count()
            self._condition.notify_all()

    # -------------------------------------------------------------------------------------------- drawing
    def _waiting(self) -> int:
        return sum(job.left for job in self._queue)

    def _count(self) -> None:
        self.telemetry.waiting.set(self._waiting())

    def _draw_all(self) -> None:
        while True:
            with self._condition:
                batch = self._next()
                while batch is None and not self._stopping:
                    self._condition.wait(self._pause())
                    batch = self._next()
                if batch is None:
                    return
            self._draw(*batch)

    def _pause(self) -> float | None:
        # Seconds until something is to do without a notice: a batch that waited long enough, or a deadline.
        now = time.monotonic()
        times = [job.deadline - now for job in self._queue]
        times += [
            job.arrived + self.settings.wait - now for job in self._queue if self._sizes.get(job.task.key)
        ]
        return max(1e-4, min(times)) if times else None

    def _next(self) -> tuple[list[tuple[Job, int]], int] | None:
        """The rows of the next batch, as (job, number of the row), and the batch's size. None: wait."""
        now = time.monotonic()
        for job in [job for job in self._queue if now > job.deadline]:
            self._queue.remove(job)
            late = f"not done within {self.settings.deadline:g} s; try again later"
            _fail(job, ApiError(503, late, code="deadline_exceeded", retry_after=10))
        seen = set()
        for job in self._queue:
            key, group = job.task.key, (job.task.key, job.task.together)
            if group in seen:
                continue
            seen.add(group)
            sizes = self._sizes.get(key)
            mates = [other for other in self._queue if (other.task.key, other.task.together) == group]
            rows = sum(other.left for other in mates)
            if not sizes:
                self._ask(job.task, rows)
                continue
            if rows < sizes[-1] and now < mates[0].arrived + self.settings.wait and not self._stopping:
                continue
            if key in self._others:
                self._others.move_to_end(key)
            return self._take(mates, sizes)
        return None

    def _take(self, mates: list[Job], sizes: list[int]) -> tuple[list[tuple[Job, int]], int]:
        rows: list[tuple[Job, int]] = []
        while len(rows) < sizes[-1] and any(job.left for job in mates):
            for job in mates:
                if job.left and len(rows) < sizes[-1]:
                    rows.append((job, job.taken))
                    job.taken += 1
        for job in mates:
            if job.taken == 0:
                continue
            self._queue.remove(job)
            if job.left:
                self._queue.append(job)
        rows.sort(key=lambda row: mates.index(row[0]))  # rows of a job in their order, as drawn alone
        self._count()
        return rows, next(size for size in sizes if size >= len(rows))

    def _draw(self, batch: list[tuple[Job, int]], size: int) -> None:
        task, started = batch[0][0].task, time.monotonic()
        rows = [job.task.rows[i] for job, i in batch]
        jobs = list(dict.fromkeys(job for job, _ in batch))
        results = None
        try:
            for made in _steps(task.draw(rows + rows[-1:] * (size - len(rows)))):
                if not isinstance(made, Shown):
                    results = made
                    break
                for (job, i), shown in zip(batch, made.results):
                    if job.show is not None:
                        job.show(i, shown)
                if all(job.future.cancelled() for job in jobs):
                    return
        except Exception as error:
            if len(jobs) == 1:
                self._give_up(jobs[0], error)
                return
            for job in jobs:  # one of them is at fault: the others are drawn without it
                self._draw([row for row in batch if row[0] is job], size)
            return
        seconds = time.monotonic() - started
        self._seconds_per_row += 0.2 * (seconds / len(rows) - self._seconds_per_row)
        self.telemetry.batches.inc()
        self.telemetry.rows.inc(len(rows))
        self.telemetry.slots.inc(size)
        self.telemetry.batch_seconds.observe(seconds)
        for (job, i), result in zip(batch, results):
            job.results[i] = result
            job.done += 1
            self.telemetry.pictures.labels(job.task.model, job.task.verb).inc()
            if job.done == len(job.results):
                with contextlib.suppress(InvalidStateError):  # the client has gone
                    job.future.set_result(job.results)
        with self._condition:
            self._condition.notify_all()

    def _give_up(self, job: Job, error: Exception) -> None:
        with self._condition:
            if job in self._queue:
                self._queue.remove(job)
            self._count()
        _fail(job, as_api_error(error))

    # ------------------------------------------------------------------------------------------ compiling
    def _ask(self, task: Task, rows: int) -> None:
        # Announced programs come in the order of their list, unless a request waits for one.
        sizes = self.batch_sizes(task.sampler)
        if task.key in self._announced_keys:
            size = sizes[0]
        else:
            size = next((size for size in sizes if size >= rows), sizes[-1])
        if self._compiling is not None and self._compiling[0] == task.key:
            return
        if all(asked.key != task.key for asked, _ in self._asked):
            self._asked.append((task, size))
            self._condition.notify_all()

    def _compile_all(self) -> None:
        while True:
            with self._condition:
                self._compiling = None
                self._condition.wait_for(lambda: self._stopping or self._asked or self._announced)
                if self._stopping:
                    return
                task, size = self._asked.popleft() if self._asked else self._announced.popleft()
                if size in self._sizes.get(task.key, ()):
                    continue
                self._compiling = task.key, size
            self._compile(task, size)

    def _compile(self, task: Task, size: int) -> None:
        started = time.monotonic()
        try:
            keys = task.sampler.compiling(lambda: list(_steps(task.draw([task.rows[0]] * size))))
        except Exception as error:
            with self._condition:
                failed = [job for job in self._queue if job.task.key == task.key]
                for job in failed:
                    self._queue.remove(job)
                self._compiling = None
            for job in failed:
                _fail(job, as_api_error(error))
            if task.key in self._announced_keys:
                LOG.error("a program of %s cannot be compiled: %s", task.model, one_line(error))
            return
        seconds = time.monotonic() - started
        self.telemetry.compiled.inc()
        self.telemetry.compile_seconds.inc(seconds)
        LOG.info("%s %s: programs for %d rows, %.1f s", task.model, task.verb, size, seconds)
        with self._condition:
            self._sizes[task.key] = sorted({*self._sizes.get(task.key, ()), size})
            if task.key in self._announced_keys:
                self._kept |= keys
            else:
                self._others[task.key] = task.sampler, keys
                self._forget()
            self._condition.notify_all()

    def _forget(self) -> None:
        # Drops the programs of the keys that were used longest ago.
        waiting = {job.task.key for job in self._queue}
        for key in [key for key in self._others if key not in waiting][: max(0, len(self._others) - OTHERS)]:
            sampler, keys = self._others.pop(key)
            del self._sizes[key]
            used = self._kept.union(*(keys for owner, keys in self._others.values() if owner is sampler))
            sampler.forget(keys - used)


def _steps(made: list[Any] | Iterator[Shown | list[Any]]) -> Iterator[Shown | list[Any]]:
    return made if isinstance(made, Iterator) else iter([made])


def _fail(job: Job, error: Exception) -> None:
    with contextlib.suppress(InvalidStateError):
        job.future.set_exception(error)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about an exception. An unexpected one goes to the log, and the client learns
    nothing of it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return ApiError(400, one_line(error))
    if isinstance(error, NumericalError):
        return ApiError(400, f"{one_line(error)}; try a smaller guidance_scale", code="not_finite")
    LOG.error("a batch failed", exc_info=error)
    return ApiError(500, "the pictures could not be drawn; the server's log says why")
