"""TensorFlow and TensorFlow Datasets for the input pipeline, imported only when something needs them.

Paths with "://" are listed and read through `tf.io.gfile`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from unclip_jax.errors import MissingPackageError
from unclip_jax.paths import store_errors


def import_tensorflow(needed_by: str) -> Any:
    """The tensorflow module, with few messages and kept off the GPU.

    Args:
      needed_by: what needs it, for the error.

    Raises `ImportError` with one line if TensorFlow is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import tensorflow as tf
    except ImportError:
        raise MissingPackageError(f"{needed_by} needs TensorFlow: pip install tensorflow") from None
    try:
        tf.config.set_visible_devices([], "GPU")  # otherwise it would take the memory that JAX needs
    except RuntimeError:  # the caller has already initialised TensorFlow
        pass
    return tf


def import_tfds() -> Any:
    """The tensorflow_datasets module. Raises `ImportError` with one line if it is not installed."""
    import_tensorflow("the data source 'tfds'")
    try:
        import tensorflow_datasets
    except ImportError:
        raise MissingPackageError(
            "the data source 'tfds' needs TensorFlow Datasets: pip install tensorflow-datasets"
        ) from None
    return tensorflow_datasets


def gfile() -> Any:
    """TensorFlow's module for files in a store. Raises `ImportError` if TensorFlow is not installed."""
    return import_tensorflow("a path with ://").io.gfile


@contextlib.contextmanager
def open_remote(path: str) -> Iterator[Any]:
    """A file in a store, opened for reading bytes; it also has `size()`. Raises `OSError` naming the path."""
    with store_errors(path), gfile().GFile(path, "rb") as file:
        yield file


def glob_remote(pattern: str) -> list[str]:
    """The paths in a store that match a glob. Raises `OSError` naming a glob that cannot be looked up."""
    with store_errors(pattern):
        return gfile().glob(pattern)


def stat_remote(path: str) -> tuple[int, int]:
    """(bytes, time of the last change in ns) of a file in a store. Raises `OSError` naming the path."""
    with store_errors(path):
        status = gfile().stat(path)
    return int(status.length), int(status.mtime_nsec)
