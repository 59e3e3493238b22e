"""Several hosts as one run: they stop after the same step, compile together and gather values."""

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

RESTART = 75  # exit status (EX_TEMPFAIL): the run itself is intact; start the same command again
COMPILE_TIMEOUT = 3600  # seconds that a host waits until all the others have compiled


class Stop:
    """True when the run must save and exit; `received` holds the signals."""

    def __init__(self):
        self.received: list[int] = []

    def __bool__(self) -> bool:
        return bool(self.received)

    def after(self, step: int) -> bool:
        """Whether to stop after this step.

        Every host calls it after every step. All hosts stop after the same step.
        """
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.received.append(signal.SIGTERM)
        return bool(self)


@contextlib.contextmanager
def stop_signals(alone: bool = False) -> Iterator[Stop]:
    """Catches SIGTERM, which also announces maintenance, and SIGINT, so that the loop can save and exit.

    A second signal acts at once. With several hosts, jax itself listens for SIGTERM, because all of them must
    stop after the same step.

    Args:
      alone: whether this host stops independently of the others, and so catches the signals itself.
    """
    stop, previous = Stop(), {}

    def handle(number, frame):
        stop.received.append(number)
        signal.signal(number, previous[number])
        log.info("stopping after this step")

    try:
        for number in (signal.SIGTERM, signal.SIGINT) if alone or jax.process_count() == 1 else ():
            previous[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: the caller handles signals
        pass
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def compiled_together(update: Callable) -> Callable:
    """Wraps a jitted function: at its first call, every host compiles it before any host runs it.

    Otherwise a host that takes long to compile could exceed the time that the others wait in a collective.
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
    """Returns when every host has reached this call.

    Args:
      key: name of the call, the same on all hosts.
      seconds: time to wait; after it the call raises an error.
    """
    if jax.process_count() > 1:
        import orbax.checkpoint as ocp

        barrier = ocp.multihost.get_barrier_sync_fn(processes=set(range(jax.process_count())))
        barrier(key=f"unclip_jax_{key}", timeout_ms=seconds * 1000)


def print_once(text: str) -> None:
    """Prints a line to standard error, on the first host only. It leaves a progress bar intact."""
    if jax.process_index() == 0:
        tqdm.write(text, file=sys.stderr)


def leave_if_stopped(stop: Stop) -> None:
    """Raises SystemExit if a signal stopped the run. The run has saved its work by then.

    The status is 130 after SIGINT and RESTART after SIGTERM. On RESTART, a launcher starts the command again.
    """
    if stop:
        print_once("stopped; rerun the same command to resume")
        raise SystemExit(130 if signal.SIGINT in stop.received else RESTART)


def on_every_host(array: jax.Array) -> np.ndarray:
    """The complete value of a global array as a NumPy array, on every host. Every host must call it."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(jax.device_get(array))
