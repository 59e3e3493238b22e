"""The output of a run: metrics.jsonl, trackers and progress line. The watchdog that ends a run that hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from unclip_jax.data import ops, pipeline
from unclip_jax.errors import NumericalError
from unclip_jax.grid import save_grid
from unclip_jax.paths import is_remote, local_copy, put_folder, store_errors, user_path, write_whole
from unclip_jax.run.hardware import CHIPS
from unclip_jax.run.hosts import RESTART, on_every_host
from unclip_jax.run.resume import config_json
from unclip_jax.run.settings import parse_profile
from unclip_jax.run.trackers import Trackers

log = logging.getLogger("unclip_jax")

MAX_SKIPPED = 50  # a run stops after so many skipped updates in a row


def due(step: int, every: int, last: int) -> bool:
    """Whether an action that is due `every` steps (0: never) is due after `step` steps; always at `last`."""
    return every > 0 and (step % every == 0 or step == last)


def split_records(lines: list[bytes], start: int) -> tuple[list[bytes], list[bytes]]:
    """Splits the lines of an earlier `metrics.jsonl` into those that stay and those that are no records.

    The steps after `start` will run again, so their records are in neither. Nor is a last line that was cut
    off when the process ended.
    """
    kept, bad = [], []
    for i, line in enumerate(lines):
        try:
            step = json.loads(line)["step"]
            later = step > start
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            if i < len(lines) - 1 or line.endswith(b"\n"):
                bad.append(line if line.endswith(b"\n") else line + b"\n")
            continue
        if not later and line.endswith(b"\n"):
            kept.append(line)
    return kept, bad


class Watchdog:
    """Ends the process when no step has finished for `patience` seconds.

    It prints every thread's stack and exits with the status RESTART. It is needed because JAX does not notice
    a device or another host that is alive but stuck. It starts to watch when the first step has finished.
    With a patience of 0 it never watches.
    """

    def __init__(self, patience: float):
        self.patience, self.last_progress, self.asleep = patience, time.monotonic(), True
        self.closed = threading.Event()
        if patience > 0:
            threading.Thread(target=self._watch, daemon=True).start()

    def step_finished(self) -> None:
        """Records that a step has finished."""
        self.last_progress, self.asleep = time.monotonic(), False

    def sleep(self) -> None:
        """Stops watching until the next step has finished, because the next operation may take any time."""
        self.asleep = True

    def close(self) -> None:
        """Ends the watchdog."""
        self.closed.set()

    def _watch(self) -> None:
        while not self.closed.wait(min(self.patience / 4, 5.0)):
            silent = time.monotonic() - self.last_progress
            if not self.asleep and silent > self.patience:
                faulthandler.dump_traceback(all_threads=True)
                print(
                    f"host {jax.process_index()}: no step finished for {silent:.0f} s "
                    f"(config.watchdog {self.patience:g}): a device or another host hangs. "
                    "The newest checkpoint is intact; run the same command again to resume from it",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                os._exit(RESTART)


class Logger:
    """Writes a run's metrics to `metrics.jsonl`, to trackers, and to standard error (progress bar or lines).

    Args:
      config: the run's: steps, batch_size, log_every, watchdog, profile ("10:20" traces these steps of this
        process, counted from its first,
        into `profile/`), track, keep_best.
      workdir: the run's folder.
      name: the stage's name, for the progress bar.
      start: the number of steps already done.
      stats: statistics of the training batches.

    Besides the metrics of a step, a record holds:

    value                           what it is
    step_time                       seconds per step
    input_wait                      seconds per step in which the host waited for the next batch
    examples_per_second             examples of the global batch; `_per_device`: the same per device
    checkpoint_seconds              time spent on checkpoints since the last record
    evaluation_seconds              time spent on evaluations since the last record
    host_memory_gib                 peak memory of the host's process
    device_memory_gib               peak memory of a device, if the device reports it
    bad_records                     records that this host could not read so far
    full_captions                   captions so far that fill all tokens of a text encoder: most were cut
    mfu                             share of the chips' peak arithmetic that the model needs; only if
                                    `operations` is set and the chip is known

    Raises:
      ValueError: when `profile` is not FIRST:LAST with FIRST less than LAST.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: str | os.PathLike,
        name: str,
        start: int,
        stats: pipeline.Stats | None = None,
    ):
        self.start, self.total, self.batch_size, self.every = (
            start,
            config.steps,
            config.batch_size,
            config.log_every,
        )
        self.name, self.main, self.bar = name, jax.process_index() == 0, None
        self.workdir, self.last = user_path(workdir), start
        self.stats, self.waited = stats, 0.0
        self.spent: dict[str, float] = {}
        self.operations = 0.0  # in a step's gradients, without what remat computes twice
        self.pending: list[tuple[int, Mapping[str, jax.Array]]] = []
        self.finished = 0  # number of pending steps known to have finished
        self.made = self.clock = time.perf_counter()
        self.clock_step = start
        self.profiled = parse_profile(config.profile)
        self.traces = (
            tempfile.mkdtemp() if self.profiled and is_remote(workdir) else str(self.workdir / "profile")
        )
        self.tracing = False
        self.skipped, self.watchdog = 0, Watchdog(config.watchdog)
        self.trackers: Trackers | None = None
        if self.main:
            self.trackers = Trackers(workdir, name, config_json(config), config_json(config.track), start)
        if not self.main:
            return
        self.metrics, lines = self.workdir / "metrics.jsonl", []
        with store_errors(self.metrics):
            self.workdir.mkdir(parents=True, exist_ok=True)
            if self.metrics.exists():
                lines = self.metrics.read_bytes().splitlines(keepends=True)
        kept, bad = split_records(lines, start)
        if bad:
            aside = self.workdir / "metrics.bad.jsonl"
            with store_errors(aside):
                before = aside.read_bytes() if aside.exists() else b""
            write_whole(aside, before + b"".join(bad))
            log.warning("%d lines of %s are no records; they are now in %s", len(bad), self.metrics, aside)
        write_whole(self.metrics, b"".join(kept))
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.total, initial=start, desc=name, unit="step", dynamic_ncols=True)

    def step(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of the step just dispatched, and fetches them only when a record is due.

        Args:
          step: the step, counted from 1.
          metrics: its metrics, on the devices.

        Raises:
          FloatingPointError: when too many updates in a row were skipped. The message names the metrics that
            were not finite.
        """
        self.pending.append((step, metrics))
        self.last = step
        if step - self.start in self.profiled:
            jax.block_until_ready(metrics)  # the trace begins and ends between steps
            if step - self.start == self.profiled[0]:
                jax.profiler.start_trace(self.traces)
                self.tracing = True
            else:
                self._end_trace()
        if self.bar is not None:
            self.bar.update(1)
        while self.finished < len(self.pending) and all(
            value.is_ready() for value in self.pending[self.finished][1].values()
        ):
            self.finished += 1  # a step has finished, though no record is due
            self.watchdog.step_finished()
        if not due(step, self.every, self.total):
            return
        values = jax.device_get([m for _, m in self.pending])
        self.pending.clear()
        self.finished = 0
        self.watchdog.step_finished()
        self._count_skipped(step, values)
        now = time.perf_counter()
        seconds = (now - self.clock) / max(step - self.clock_step, 1)
        self.clock, self.clock_step = now, step
        record = {key: float(np.mean([v[key] for v in values])) for key in values[0]}
        record |= {"step_time": seconds, "examples_per_second": self.batch_size / seconds}
        record["examples_per_second_per_device"] = record["examples_per_second"] / jax.device_count()
        record |= self._resources(seconds, len(values))
        self.record(step, record)
        progress = (
            f"loss {record['loss']:.4f}  " if "loss" in record else ""
        ) + f"{record['examples_per_second']:.1f} examples/s"
        if self.bar is not None:
            self.bar.set_postfix_str(progress)
        elif self.main:
            left = time.strftime("%H:%M:%S", time.gmtime(seconds * (self.total - step)))
            log.info("%s step %d/%d  %s  left %s", self.name, step, self.total, progress, left)

    def _end_trace(self) -> None:
        jax.profiler.stop_trace()
        self.tracing = False
        if is_remote(self.workdir):
            put_folder(Path(self.traces), self.workdir / "profile" / str(jax.process_index()))
            shutil.rmtree(self.traces)

    def _resources(self, seconds: float, steps: int) -> dict[str, float]:
        # Time, input and memory figures since the last record.
        record, chip = (
            {f"{key}_seconds": value for key, value in self.spent.items()},
            CHIPS.get(jax.devices()[0].device_kind),
        )
        self.spent = {}
        if self.stats is not None:
            record |= {"input_wait": (self.stats.waited - self.waited) / steps, "bad_records": self.stats.bad}
            record["full_captions"] = self.stats.full
            self.waited = self.stats.waited
        record["host_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            2**30 if sys.platform == "darwin" else 2**20
        )
        memory = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            record["device_memory_gib"] = memory["peak_bytes_in_use"] / 2**30
        if self.operations and chip is not None:
            record["mfu"] = self.operations / seconds / jax.device_count() / chip.flops
        return record

    def _count_skipped(self, step: int, values: list[dict[str, np.ndarray]]) -> None:
        for value in values:
            self.skipped = self.skipped + 1 if value.get("skipped") else 0
            if self.skipped >= MAX_SKIPPED:
                bad = ", ".join(key for key, number in value.items() if not np.isfinite(number))
                raise NumericalError(
                    f"{self.name} step {step}: {self.skipped} updates in a row were skipped, "
                    f"their {bad} not finite. The parameters are unchanged, the last checkpoint is intact. "
                    "Lower the learning rate or check the data, and run the command again"
                )

    @contextlib.contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """Keeps the time spent inside out of the step time. The next record has it as `<what>_seconds`."""
        started, asleep = time.perf_counter(), self.watchdog.asleep
        self.watchdog.sleep()
        yield
        if not asleep:
            self.watchdog.step_finished()
        took = time.perf_counter() - started
        self.clock += took
        self.spent[what] = self.spent.get(what, 0.0) + took

    def seconds(self) -> float:
        """Wall time in seconds since the logger was made."""
        return time.perf_counter() - self.made

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values by name to `metrics.jsonl` and to the trackers, on the first host."""
        if not self.main:
            return
        with (
            store_errors(self.metrics),
            self.metrics.open("a", encoding="utf-8") as file,
        ):  # an object store rewrites the file
            file.write(json.dumps({"step": step, **{k: float(f"{v:.8g}") for k, v in values.items()}}) + "\n")
        if self.trackers is not None:
            self.trackers.scalars(step, values)

    def samples(self, step: int, images: jax.Array, captions: list[str], valid: int) -> None:
        """Writes a labelled grid of images to `samples/<step>.png` and passes it to the trackers.

        The first host writes the grid, but every host must call this method.

        Args:
          step: the step.
          images: (B, H, W, 3) floats in [-1, 1].
          captions: their labels.
          valid: the number of images to show; the rest are padding.
        """
        images = on_every_host(images)[:valid]
        if self.main:
            path = save_grid(
                self.workdir / "samples" / f"{step:07d}.png", ops.to_uint8(images), captions[:valid], cell=128
            )
            if self.trackers is not None:
                self.trackers.picture(step, local_copy(path))

    def close(self) -> None:
        """Ends the trace if one is running, and closes the watchdog, the progress bar and the trackers."""
        if self.tracing:  # the run ended before the last step to trace
            self._end_trace()
        for thing in (self.watchdog, self.bar):
            if thing is not None:
                thing.close()
        if self.trackers is not None:
            failed = sys.exc_info()[0] is not None
            outcome = "failed" if failed else "finished" if self.last >= self.total else "stopped"
            self.trackers.close(outcome)
