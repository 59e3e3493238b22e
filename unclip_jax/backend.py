"""The platform that programs are traced for."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax

_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def lowered_for(platform: str) -> Iterator[None]:
    """A context in which programs are traced as for a platform ("gpu") that this machine need not have."""
    token = _PLATFORM.set(platform)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def platform_of(mesh: Any = None) -> str:
    """The platform that a mesh's programs run on: "cpu", "gpu" or "tpu". Without a mesh, jax's default."""
    found = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return _PLATFORM.get() or found
