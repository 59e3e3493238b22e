"""Pictures by url: they stay in memory for an hour, and the oldest ones go when memory is short."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable


class Links:
    """Pictures by names that cannot be guessed.

    Args:
      seconds: how long a picture stays.
      size: bytes of all pictures together. The oldest ones are dropped when a new one does not fit.
      clock: the time in seconds; tests give their own.
    """

    def __init__(self, seconds: float, size: int, clock: Callable[[], float] = time.monotonic):
        self.seconds, self.size, self.clock = seconds, size, clock
        self._kept: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()

    def add(self, data: bytes) -> str:
        """Keeps a picture and returns its name."""
        name = secrets.token_urlsafe(24)
        with self._lock:
            self._kept[name] = self.clock() + self.seconds, data
            self._bytes += len(data)
            self._drop()
        return name

    def get(self, name: str) -> bytes | None:
        """The picture of a name; None where there is none, or no longer."""
        with self._lock:
            self._drop()
            return self._kept[name][1] if name in self._kept else None

    @property
    def bytes(self) -> int:
        """Bytes in use."""
        return self._bytes

    def _drop(self) -> None:
        now = self.clock()
        while self._kept:
            name, (until, data) = next(iter(self._kept.items()))
            if until > now and self._bytes <= self.size:
                return
            del self._kept[name]
            self._bytes -= len(data)
