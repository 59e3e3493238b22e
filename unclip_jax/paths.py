"""Paths that a user names: files and folders of this machine, or of a store behind a URI (`gs://bucket/run`), through TensorFlow's clients.

What only a file of this machine can be, such as a memory map, is a copy of it in the cache (`local_copy`).
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unclip_jax.errors import InputError, MissingPackageError

SCHEMES = ("gs",)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path lies in a store."""
    return "://" in os.fspath(path)


def user_path(path: str | os.PathLike) -> Any:
    """A path with pathlib's methods: a `pathlib.Path`, `~` expanded, or an `etils.epath.Path` for one in a store.

    Raises:
      ValueError: on a URI of another scheme than gs.
    """
    if not is_remote(path):
        return Path(path).expanduser()
    scheme = os.fspath(path).partition("://")[0]
    if scheme not in SCHEMES:
        raise InputError(
            f"{os.fspath(path)}: paths may begin with {', '.join(f'{known}://' for known in SCHEMES)}, or are this machine's"
        )
    from etils import epath

    return epath.Path(path)


def absolute(path: str | os.PathLike) -> str:
    """A path without `..`, relative to no folder."""
    if not is_remote(path):
        return str(Path(path).expanduser().resolve())
    scheme, _, rest = os.fspath(path).partition("://")
    return f"{scheme}://{posixpath.normpath(rest)}"


def total_bytes(path: str | os.PathLike) -> int:
    """The size of all files below a folder."""
    path = user_path(path)
    if not is_remote(path):
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    with store_errors(path):
        return sum((folder / name).stat().length for folder, _, names in path.walk() for name in names)


def cache_folder() -> Path:
    """Where copies, indices and compiled programs are kept: UNCLIP_CACHE, or ~/.cache/unclip_jax."""
    return Path(os.environ.get("UNCLIP_CACHE") or Path.home() / ".cache" / "unclip_jax")


@contextlib.contextmanager
def store_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turns what a store's client raises into an OSError that names the path."""
    try:
        yield
    except Exception as error:
        if not is_store_error(error):
            raise
        kind = FileNotFoundError if "NotFound" in type(error).__name__ else OSError
        raise kind(f"{os.fspath(path)} cannot be reached ({' '.join(str(error).split())[:300]})") from None


def is_store_error(error: BaseException) -> bool:
    """Whether an exception is of TensorFlow's file systems, whose errors are no OSErrors."""
    return type(error).__module__.startswith("tensorflow.")


def check_store(path: str | os.PathLike) -> None:
    """Asks a store for the bucket of a path, once and at the beginning: without it, or the right to it, its clients try for minutes.

    Raises:
      OSError, ImportError: one line, when it does not answer as hoped.
    """
    if not is_remote(path):
        return
    try:
        from google.cloud import storage
    except ImportError:
        raise MissingPackageError(
            'paths that begin with gs:// need Google\'s client: pip install "unclip_jax[gcs]"'
        ) from None
    bucket = os.fspath(path).partition("://")[2].partition("/")[0]
    try:
        next(iter(storage.Client().list_blobs(bucket, max_results=1, retry=None, timeout=60)), None)
    except Exception as error:  # the client's and the network's are many
        raise OSError(f"{os.fspath(path)} cannot be reached ({' '.join(str(error).split())[:300]})") from None


def local_copy(path: str | os.PathLike) -> Path:
    """A file or folder of this machine with what lies at `path`: itself, or a copy in the cache. Of what was copied before only files whose
    size or time has changed are fetched again.

    Raises:
      FileNotFoundError, OSError: when it is not there, or out of reach.
    """
    path = user_path(path)
    if not is_remote(path):
        return path
    with store_errors(path):
        if not path.exists():
            raise FileNotFoundError(f"there is nothing at {os.fspath(path)}")
        target = cache_folder() / "stores" / os.fspath(path).replace("://", "/")
        if not path.is_dir():
            return _fetch(path, target)
        for folder, _, names in path.walk():
            for name in names:
                _fetch(folder / name, target / os.path.relpath(folder, path) / name)
        return target


def _fetch(path: Any, target: Path) -> Path:
    there = path.stat()
    if target.is_file():
        here = target.stat()
        if (here.st_size, int(here.st_mtime)) == (there.length, int(there.mtime)):
            return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    path.copy(partial, overwrite=True)
    os.utime(partial, (there.mtime, there.mtime))
    partial.replace(target)
    return target


def write_whole(path: str | os.PathLike, data: bytes | str) -> None:
    """Writes a file, which appears whole or not at all; makes its folder."""
    data = data.encode("utf-8") if isinstance(data, str) else data
    path = user_path(path)
    with store_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_remote(path):
            path.write_bytes(data)
            return
    partial = path.with_name(
        f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial"
    )  # several may write the same
    partial.write_bytes(data)
    partial.replace(path)


def write_json(path: str | os.PathLike, value: Mapping) -> None:
    """Writes a JSON object by `write_whole`, its keys sorted."""
    write_whole(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike, last: str) -> Iterator[Path]:
    """A new folder of this machine to write into, which takes the place of `path` when the block ends without an error: whole or not at
    all. In a store, where folders cannot be renamed, the file `last`, by which readers know that all is there, is put there last."""
    path = user_path(path)
    if is_remote(path):
        with tempfile.TemporaryDirectory() as made:
            yield Path(made)
            put_folder(Path(made), path, last)
        return
    partial = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_folder(folder: Path, path: Any, last: str = "") -> None:
    """Copies a folder of this machine to a store, in the place of what is there, the file `last` last."""
    with store_errors(path):
        if last:
            (path / last).unlink(missing_ok=True)
        path.rmtree(missing_ok=True)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        for file in sorted(files, key=lambda file: str(file.relative_to(folder)) == last):
            target = path / file.relative_to(folder).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
