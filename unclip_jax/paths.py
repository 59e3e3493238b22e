"""Paths that a user names: local files and folders, or those of a store behind a URI (`gs://bucket/run`).

TensorFlow's clients read and write the stores. Some uses, such as a memory map, need a local file:
`local_copy` copies it into the cache.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import posixpath
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unclip_jax.errors import InputError, MissingPackageError, input_errors

SCHEMES = ("gs",)
SYSTEM_NAMES = ("__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir", "lost+found")  # beside those with a dot


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path lies in a store."""
    return "://" in os.fspath(path)


def is_hidden(name: str) -> bool:
    """Whether a name inside a folder or an archive is that of a hidden file, or of one that a system leaves.

    True if any part of the name begins with a dot, or is one of SYSTEM_NAMES.
    """
    parts = (part for part in name.replace("\\", "/").split("/") if part not in ("", ".", ".."))
    return any(part.startswith(".") or part in SYSTEM_NAMES for part in parts)


def user_path(path: str | os.PathLike) -> Any:
    """A path with pathlib's methods: a `pathlib.Path` with `~` expanded, or an `etils.epath.Path` in a store.

    Raises:
      ValueError: when the URI's scheme is not gs, `~` names an unknown user, or the path is empty or has a
        NUL character.
    """
    if not os.fspath(path):
        raise InputError("'': a path is not empty")
    if "\0" in os.fspath(path):
        raise InputError(f"{os.fspath(path)!r}: a path has no NUL characters")
    if not is_remote(path):
        with input_errors(os.fspath(path), RuntimeError):
            return Path(path).expanduser()
    check_scheme(path)
    from etils import epath

    return epath.Path(path)


def check_scheme(path: str | os.PathLike) -> None:
    """Raises `InputError` for a path in a kind of store that this package does not read."""
    if is_remote(path) and os.fspath(path).partition("://")[0] not in SCHEMES:
        schemes = ", ".join(f"{known}://" for known in SCHEMES)
        raise InputError(f"{os.fspath(path)}: paths may begin with {schemes} or be local")


def absolute(path: str | os.PathLike) -> str:
    """The absolute path, without `..`."""
    if not is_remote(path):
        return os.path.realpath(user_path(path))
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
    """The folder for copies, indices and compiled programs: UNCLIP_CACHE, or ~/.cache/unclip_jax."""
    return Path(os.environ.get("UNCLIP_CACHE") or Path.home() / ".cache" / "unclip_jax")


@contextlib.contextmanager
def store_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turns the exceptions of a store's client into an OSError that names the path."""
    try:
        yield
    except Exception as error:
        if not is_store_error(error):
            raise
        kind = FileNotFoundError if "NotFound" in type(error).__name__ else OSError
        raise kind(f"{os.fspath(path)} cannot be reached ({' '.join(str(error).split())[:300]})") from None


def is_store_error(error: BaseException) -> bool:
    """Whether an exception comes from TensorFlow's file systems. Their errors are not OSErrors."""
    return type(error).__module__.startswith("tensorflow.")


def check_store(path: str | os.PathLike) -> None:
    """Checks that the bucket of a path can be read. A local path passes.

    Call it once at the start: where the bucket is missing or access is denied, the clients retry for minutes.

    Raises:
      OSError: with a message of one line, when the bucket cannot be read.
      ImportError: when Google's client is not installed.
      ValueError: when the URI's scheme is not gs.
    """
    check_scheme(path)
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
    except Exception as error:  # the client and the network raise many types
        raise OSError(f"{os.fspath(path)} cannot be reached ({' '.join(str(error).split())[:300]})") from None


def local_copy(path: str | os.PathLike) -> Path:
    """The local file or folder with the content of `path`: a local path itself, or a copy in the cache.

    A later call copies only the files whose size or modification time has changed.

    Raises:
      FileNotFoundError: when nothing exists at a path in a store.
      OSError: when the store cannot be reached.
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
    stored = path.stat()
    if target.is_file():
        cached = target.stat()
        if (cached.st_size, int(cached.st_mtime)) == (stored.length, int(stored.mtime)):
            return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    path.copy(partial, overwrite=True)
    os.utime(partial, (stored.mtime, stored.mtime))
    partial.replace(target)
    return target


@contextlib.contextmanager
def new_folders(folder: Path, *, keep: bool = True) -> Iterator[None]:
    """Creates a local folder and its parents for the block.

    It removes those that it created if the block fails, and always if `keep` is False.
    """
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    done = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
        done = keep
    finally:
        for path in [] if done else missing:
            with contextlib.suppress(OSError):  # another process may have put something there
                path.rmdir()


def _is_special(path: Path) -> bool:
    # Whether something is there that is neither a plain file nor nothing, such as a device or a FIFO.
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def write_whole(path: str | os.PathLike, data: bytes | str) -> None:
    """Writes a file and creates its folder. The file appears complete or not at all.

    A link is followed: the file that it names is replaced. What is no plain file, such as a device or a FIFO,
    is written to. A failure leaves nothing behind.
    """
    data = data.encode("utf-8") if isinstance(data, str) else data
    path = user_path(path)
    if is_remote(path):
        with store_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return
    if _is_special(path):
        path.write_bytes(data)
        return
    path = Path(os.path.realpath(path))
    # Processes of several hosts, and several threads, may write the same file.
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    with new_folders(path.parent):
        try:
            partial.write_bytes(data)
            if path.exists():
                shutil.copymode(path, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike) -> None:
    """Tries whether `write_whole` can write a file, without changing anything. Call it before long work.

    Raises:
      OSError: with a message of one line, when the file cannot be written.
      ValueError: when the path is a folder, or its scheme is unknown.
    """
    named, path = os.fspath(path), user_path(path)
    if is_remote(path):
        check_store(path)
        return
    try:
        if path.is_dir() or named.endswith("/"):
            raise InputError(f"{named} is a folder; name a file")
        if not _is_special(path):
            path = Path(os.path.realpath(path))
            with new_folders(path.parent, keep=False):
                _is_special(path)  # names that are too long show now that the folder is there
                with tempfile.TemporaryFile(dir=path.parent) as file:
                    file.write(b"x")
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "permission denied")
    except OSError as error:
        words = os.strerror(errno.ENOTDIR) if isinstance(error, FileExistsError) else error.strerror
        raise OSError(f"{named} cannot be written: {words}") from None


def write_json(path: str | os.PathLike, value: Mapping) -> None:
    """Writes a JSON object with sorted keys, by `write_whole`."""
    write_whole(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike, last: str) -> Iterator[Path]:
    """Yields a new local folder to write into. It replaces `path` when the block ends without an error.

    A local folder appears complete or not at all. Where `path` is a link, the folder that it names is
    replaced. A store cannot rename folders, so there the file `last` is copied last: readers take its
    presence as the sign that the folder is complete.
    """
    path = user_path(path)
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            put_folder(Path(folder), path, last)
        return
    path = Path(os.path.realpath(path))
    partial, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    with new_folders(path.parent):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            try:
                partial.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def put_folder(folder: Path, path: Any, last: str = "") -> None:
    """Copies a local folder to a store, where it replaces the old content. The file `last` is copied last."""
    with store_errors(path):
        if last:
            (path / last).unlink(missing_ok=True)
        path.rmtree(missing_ok=True)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        for file in sorted(files, key=lambda file: str(file.relative_to(folder)) == last):
            target = path / file.relative_to(folder).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
