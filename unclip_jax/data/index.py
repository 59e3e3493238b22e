"""The index of a sharded source: where each record is stored, so that any record can be read alone.

A source is indexed once: (shard, offset, length) of every record that passes the filters. The index is cached
beside its checksum, so that a later or resumed run starts at any record without reading the ones before it.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import io
import logging
import os
import stat
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from unclip_jax.data.filters import Filters, as_filters, filter_rows, no_records_message, trim_captions
from unclip_jax.data.record import Record, Source, error_summary, json_checksum
from unclip_jax.data.tensorflow import glob_remote, open_remote, stat_remote
from unclip_jax.errors import InputError
from unclip_jax.paths import cache_folder, check_scheme, is_hidden, is_remote, write_whole

log = logging.getLogger(__name__)

INDEX_VERSION = 2  # part of the name of every cached index: raise it when the meaning of an index changes
OPEN_FILES = 256  # shards that stay open per source; every further shard is opened for each read

HEAD = 64  # bytes of a shard that say what it is if it has no records
# The first bytes of compressed files. zlib has four levels.
KINDS = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ", "xz"),
    (b"PK\x03\x04", "zip"),
    *((b"\x78" + level, "zlib") for level in (b"\x01", b"\x5e", b"\x9c", b"\xda")),
)

FindRecords = Callable[
    [str], np.ndarray
]  # path of a shard -> (offset, length) of its records in bytes, int64 (N, 2)
ParseRecord = Callable[[bytes, str], Record]  # a record's bytes, path of its shard -> the record


@dataclasses.dataclass(frozen=True)
class Index:
    """Where N records are stored.

    Attributes:
      shard: int32 (N,), the number of the record's shard.
      offset, length: int64 (N,), where the record lies in its shard, in bytes.
      n_filtered: how many more records the filters dropped.
    """

    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    n_filtered: int


def indexed_source(
    kind: str,
    pattern: str | Sequence[str],
    find_records: FindRecords,
    parse: ParseRecord,
    filters: Mapping | Filters | None,
    cache_dir: str | None,
) -> Source:
    """The source of all shards that match a glob or a list of globs, through a cached index.

    Args:
      kind: the format's name, part of the source's name and checksum.
      pattern: a glob or a list of globs, of this machine or of a store.
      find_records: (offset, length) of the records of a shard.
      parse: makes a record of its bytes.
      filters: which records to keep.
      cache_dir: where the index is cached; None for the default folder.

    Raises:
      FileNotFoundError: if nothing matches.
      ValueError: naming a broken shard, or if the filters keep nothing.
    """
    filters = as_filters(filters)
    pattern = os.fspath(pattern) if isinstance(pattern, os.PathLike) else pattern
    shards = match_shards(pattern)
    stamps = file_stamps(shards)
    key = json_checksum([kind, INDEX_VERSION, stamps, dataclasses.asdict(filters)])
    index = cached_index(key, lambda: build_index(shards, find_records, parse, filters), cache_dir)
    sizes = [[os.path.basename(shard), size] for shard, size, _ in stamps]
    checksum = json_checksum([kind, sizes, index_checksum(index)])
    name = f"{kind}:{pattern if isinstance(pattern, str) else ','.join(pattern)}"
    return sharded_source(name, shards, index, parse, filters, checksum)


def sharded_source(
    name: str, shards: Sequence[str], index: Index, parse: ParseRecord, filters: Filters, checksum: str
) -> Source:
    """The source that reads its records from `shards` by `index`.

    The error of a damaged record names the shard and the offset.
    """
    read = shard_reader(shards)

    def fetch(i: int) -> Record:
        shard = int(index.shard[i])
        try:
            record = parse(read(shard, int(index.offset[i]), int(index.length[i])), shards[shard])
        except (ValueError, OSError, KeyError) as error:
            raise InputError(f"{shards[shard]}, byte {index.offset[i]}: {error_summary(error)}") from error
        return trim_captions(record, filters)

    return Source(name, checksum, index.n_filtered, len(index.shard), fetch)


# ------------------------------------------------------------------------------------------------------------
# Building and caching
# ------------------------------------------------------------------------------------------------------------
def build_index(
    shards: Sequence[str], find_records: FindRecords, parse: ParseRecord, filters: Filters
) -> Index:
    """The index of the records of `shards` that pass the filters, in the order of the shards.

    Records are parsed only if a filter is set. Raises `ValueError` for a broken shard or without records.
    """
    read = shard_reader(shards)

    def index_shard(shard: int) -> tuple[np.ndarray, int]:
        try:
            spans = np.asarray(find_records(shards[shard]), np.int64).reshape(-1, 2)
        except ValueError as error:
            other = _other_kind(read(shard, 0, min(HEAD, file_stamps([shards[shard]])[0][1])))
            if other is not None:
                raise InputError(f"{shards[shard]} is {other}") from None
            raise InputError(
                f"{error_summary(error)}; write this shard again or leave it out of the pattern"
            ) from None
        kept = filter_rows(lambda i: parse(read(shard, *spans[i]), shards[shard]), len(spans), filters)
        return spans[kept], len(spans)

    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(index_shard, range(len(shards))))
    rows = np.concatenate([part for part, _ in parts])
    shard = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part, _ in parts])
    total = sum(count for _, count in parts)
    if not len(rows):
        raise InputError(no_records_message(f"{len(shards)} shard(s) from {shards[0]} on", total, filters))
    return Index(shard, rows[:, 0].copy(), rows[:, 1].copy(), total - len(rows))


def _other_kind(head: bytes) -> str | None:
    # What a file is that has no records, and the remedy, by its first bytes; None if that is not known.
    for magic, kind in KINDS:
        if head.startswith(magic):
            return f"compressed with {kind}, and records are read from the middle of a shard: unpack it"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS and not the data: run `git lfs pull`"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a page of HTML and not the data: download it again"
    return None


def cached_index(key: str, build: Callable[[], Index], cache_dir: str | None) -> Index:
    """The index cached as `<cache_dir>/<key>.npz`, or `build()`, which is then cached.

    The cached file counts only if its bytes match `<key>.sha256`; otherwise the index is built again. A
    folder that cannot be written is logged and is no error.
    """
    directory = Path(cache_dir or cache_folder() / "index")
    file, checksum_file = directory / f"{key}.npz", directory / f"{key}.sha256"
    try:
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() == checksum_file.read_text().strip():
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                return Index(arrays["shard"], arrays["offset"], arrays["length"], int(arrays["n_filtered"]))
        log.warning("the cached index %s does not match its checksum: building it again", file)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError) as error:
        log.warning("cannot read the cached index %s (%s): building it again", file, error_summary(error))
    index = build()
    buffer = io.BytesIO()
    np.savez(buffer, shard=index.shard, offset=index.offset, length=index.length, n_filtered=index.n_filtered)
    data = buffer.getvalue()
    try:
        write_whole(file, data)
        write_whole(checksum_file, hashlib.sha256(data).hexdigest() + "\n")
    except OSError as error:
        reason = error_summary(error)
        log.warning(
            "cannot cache the index in %s (%s): the next run indexes again; set UNCLIP_CACHE",
            directory,
            reason,
        )
    return index


def index_checksum(index: Index) -> str:
    """The sha256 (hex) of an index's arrays."""
    digest = hashlib.sha256()
    for array in (index.shard, index.offset, index.length):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------
# Shards
# ------------------------------------------------------------------------------------------------------------
def shard_reader(shards: Sequence[str]) -> Callable[[int, int, int], bytes]:
    """A function read(shard, offset, length) -> bytes, for any thread.

    The first `OPEN_FILES` local shards that are read stay open. The function raises `ValueError` if a shard
    ends before the record does.
    """
    files: dict[int, io.FileIO] = {}
    lock = threading.Lock()

    def read(shard: int, offset: int, length: int) -> bytes:
        path = shards[shard]
        if length == 0:
            return b""
        if is_remote(path):
            with open_remote(path) as remote:
                remote.seek(int(offset))
                data = remote.read(int(length))
        else:
            file = files.get(shard)
            if file is None and len(files) < OPEN_FILES:
                with lock:
                    file = files.get(shard) or files.setdefault(shard, open(path, "rb", buffering=0))
            if file is not None:
                data = os.pread(file.fileno(), int(length), int(offset))
            else:
                with open(path, "rb", buffering=0) as briefly_open:
                    data = os.pread(briefly_open.fileno(), int(length), int(offset))
        if len(data) != length:
            raise InputError(
                f"{path} ends inside the record at byte {offset}: it changed since it was indexed"
            )
        return data

    return read


def match_shards(pattern: str | Sequence[str]) -> list[str]:
    """The sorted paths that match a glob or a list of globs, without the hidden and system files.

    Raises `FileNotFoundError` naming a glob that matches nothing.
    """
    patterns = list(pattern) if isinstance(pattern, (list, tuple)) else [pattern]
    if not patterns or not all(isinstance(item, str) for item in patterns):
        raise InputError(f"pattern must be a glob or a list of globs, got {pattern!r}")
    shards: list[str] = []
    for item in patterns:
        check_scheme(item)
        matches = (
            glob_remote(item) if is_remote(item) else glob.glob(os.path.expanduser(item), recursive=True)
        )
        named = os.path.expanduser(item).split("/")
        depth = next((i for i, part in enumerate(named) if glob.has_magic(part)), len(named))
        matches = [path for path in matches if not is_hidden("/".join(path.split("/")[depth:]))]
        if not matches:
            raise FileNotFoundError(
                f"no shard matches {item!r}: check the path; it is a glob such as /data/shards/*.tfrecord"
            )
        shards.extend(matches)
    # Two patterns may spell one path in two ways.
    unique = {path if is_remote(path) else os.path.abspath(path): path for path in sorted(shards)}
    return sorted(unique.values())


def file_stamps(paths: Sequence[str]) -> list[list]:
    """[path, bytes, time of the last change in ns] of each file. A cached index is named after them."""

    def stamp(path: str) -> list:
        if is_remote(path):
            return [path, *stat_remote(path)]
        try:
            status = os.stat(path)
        except OSError:
            if not os.path.islink(path):
                raise
            return [os.path.abspath(path), 0, 0]  # a link that leads nowhere
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is not a file: name files only")
        return [os.path.abspath(path), status.st_size, status.st_mtime_ns]

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(stamp, paths))
