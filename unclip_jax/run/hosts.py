"""Several hosts as one run: signals that stop all of them after the same step, compiling together, gathering values."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

log = logging.getLogger("unclip_jax")

RESTART = 75  # exit status (EX_TEMPFAIL): the run itself is sound; start the same command again
COMPILE_TIMEOUT = 3600  # seconds that hosts wait for one another's compilers


class Stop:
    """True when the run shall save and leave; `received` holds the signals."""

    def __init__(self):
        self.received: list[int] = []

    def __bool__(self) -> bool:
        return bool(self.received)

    def after(self, step: int) -> bool:
        """Whether to leave after this step; every host calls it at every step, and all of them leave after the same one."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.received.append(signal.SIGTERM)
        return bool(self)


@contextlib.contextmanager
def stop_signals(alone: bool = False) -> Iterator[Stop]:
    """Notes SIGTERM (a maintenance notice too) and SIGINT: the loop then saves and leaves. A second one acts at once. With several hosts
    jax itself listens for SIGTERM, as all must leave after the same step, unless this one works `alone`."""
    stop, before = Stop(), {}

    def note(number, frame):
        stop.received.append(number)
        signal.signal(number, before[number])
        log.info("stopping after this step")

    try:
        for number in (signal.SIGTERM, signal.SIGINT) if alone or jax.process_count() == 1 else ():
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: signals stay with whoever runs us
        pass
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def compiled_together(update: Callable) -> Callable:
    """A jitted function that every host compiles before any of them runs it, at its first call.

    Hosts that compile longer than a collective waits would otherwise break it.
    """
    compiled = None

    def call(*arguments: Any) -> Any:
        nonlocal compiled
        if compiled is None and jax.process_count() == 1:
            compiled = update
        elif compiled is None:
            compiled = update.lower(*arguments).compile()
            wait_for_hosts("update_compiled", COMPILE_TIMEOUT)
        return compiled(*arguments)

    return call


def wait_for_hosts(key: str, seconds: int = 24 * 3600) -> None:
    """Returns when every host has come to this call; `key` names it. An error after so many seconds."""
    if jax.process_count() > 1:
        import orbax.checkpoint as ocp

        barrier = ocp.multihost.get_barrier_sync_fn(processes=set(range(jax.process_count())))
        barrier(key=f"unclip_jax_{key}", timeout_ms=seconds * 1000)


def print_once(text: str) -> None:
    """Prints a line on standard error, from the first host alone; it does not tear a progress bar."""
    if jax.process_index() == 0:
        tqdm.write(text, file=sys.stderr)


def leave_if_stopped(stop: Stop) -> None:
    """Leaves with SystemExit if a signal stopped the run; its work is saved.

    The status is 130 after SIGINT, and RESTART after SIGTERM, on which a launcher starts the command again.
    """
    if stop:
        print_once("stopped; rerun the same command to resume")
        raise SystemExit(130 if signal.SIGINT in stop.received else RESTART)


def on_every_host(array: jax.Array) -> np.ndarray:
    """The whole value of a global array, as NumPy, on every host. Every host must call it."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(jax.device_get(array))
