"""Uncompressed tar shards, as img2dataset and webdataset write them."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np

from unclip_jax.data.filters import Filters
from unclip_jax.data.index import indexed_source
from unclip_jax.data.record import IMAGE_KEYS, Record, Source, error_summary, parse_captions, parse_metadata
from unclip_jax.data.tensorflow import open_remote
from unclip_jax.errors import InputError
from unclip_jax.paths import is_hidden, is_remote


def webdataset_source(
    pattern: str | Sequence[str], *, filters: Mapping | Filters | None = None, cache_dir: str | None = None
) -> Source:
    """The records of all tar shards that match `pattern`, a glob or a list of globs.

    Consecutive members named `<key>.<field>` form one record; the fields are jpg | jpeg | png | webp, `txt`,
    `json`. Captions are chosen as in `tfrecord_source`. Hidden and system files are skipped. A record whose
    key comes again in its tar is bad, and so is one with a link or with the same field twice.

    Raises:
      FileNotFoundError: if nothing matches.
      ValueError: for a broken or compressed tar (naming the shard), or if the filters keep nothing. A
        compressed tar cannot be read from the middle.
    """
    return indexed_source("webdataset", pattern, find_records, parse_tar, filters, cache_dir)


def find_records(path: str) -> np.ndarray:
    """(offset, length) in bytes of every record of a tar, local or in a store: int64 (N, 2).

    A record reaches from the header of its first member to the end of its last one: it is a small tar itself.
    """
    if is_remote(path):
        with open_remote(path) as file:
            return _find_records(file, file.size(), path)
    with open(path, "rb") as file:
        return _find_records(file, os.path.getsize(path), path)


def _find_records(file: BinaryIO, size: int, path: str) -> np.ndarray:
    spans: list[list[int]] = []
    headers: list[int] = []  # bytes of the header of each record's first member
    first: dict[str, int] = {}  # key -> number of its first record
    repeated: set[int] = set()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            current = None
            for member in tar:
                if not _is_data(member):
                    continue
                if member.offset_data + (member.size if member.isfile() else 0) > size:
                    raise InputError(
                        f"{path}: truncated tar: member {member.name} runs past the end of the file"
                    )
                end, key = min(tar.offset, size), _split_name(member.name)[0]
                if key == current:
                    spans[-1][1] = end - spans[-1][0]
                    continue
                if key in first:
                    repeated |= {first[key], len(spans)}
                first.setdefault(key, len(spans))
                spans.append([member.offset, end - member.offset])
                headers.append(member.offset_data - member.offset)
                current = key
            # tarfile ends without a word at a header that it cannot read, and where the file ends.
            if not _only_zeros(file, tar.offset):
                reason = f"no member and no end of the tar at byte {tar.offset}"
                raise InputError(f"{path}: {reason}: it is truncated or damaged, or tars were joined")
    except (tarfile.TarError, ValueError, OverflowError) as error:  # tarfile lets some of the latter through
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: not an uncompressed tar that can be read ({error_summary(error)})"
        ) from error
    # A record whose key comes again elsewhere is bad. A span that ends after the first header says so.
    for number in repeated:
        spans[number][1] = headers[number]
    return np.array(spans, np.int64).reshape(-1, 2)


def _only_zeros(file: BinaryIO, offset: int) -> bool:
    # Whether the file goes on at the offset, with zeros alone: that is how a tar ends.
    file.seek(offset)
    chunk = file.read(1 << 20)
    if not chunk:
        return False
    while chunk:
        if chunk.count(0) != len(chunk):
            return False
        chunk = file.read(1 << 20)
    return True


def parse_tar(data: bytes, path: str) -> Record:
    """The record of a small tar of its members. Raises `ValueError` if it is damaged or has no image."""
    members: dict[str, bytes] = {}
    key = ""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if not _is_data(member):
                    continue
                key, field = _split_name(member.name)
                if not member.isfile():
                    raise InputError(
                        f"member {member.name!r} is a link: pack the tar with --hard-dereference -h"
                    )
                if member.size and member.offset_data >= len(data):
                    reason = "comes again elsewhere in this tar: the members of a record must lie together"
                    raise InputError(f"the key {key!r} {reason}")
                if field in members:
                    raise InputError(f"record {key!r} has the member {field!r} twice: keys must differ")
                members[field] = tar.extractfile(member).read()
    except (tarfile.TarError, OverflowError) as error:
        raise InputError(f"damaged tar member ({error_summary(error)})") from error
    encoding = next((field for field in IMAGE_KEYS if field in members), None)
    if encoding is None:
        known = ", ".join(IMAGE_KEYS)
        raise InputError(
            f"record {key!r} has no image: expected a member ending in {known}, it has {sorted(members)}"
        )
    meta = parse_metadata(members["json"]) if "json" in members else {}
    return Record(key, members[encoding], parse_captions(meta, members.get("txt")), meta, path)


def _is_data(member: tarfile.TarInfo) -> bool:
    return (member.isfile() or member.islnk() or member.issym()) and not is_hidden(member.name)


def _split_name(name: str) -> tuple[str, str]:
    # "a/b/0001.seg.png" -> key "a/b/0001", field "seg.png", as webdataset splits it. "jpeg" becomes "jpg".
    head, _, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    return (f"{head}/{stem}" if head else stem), {"jpeg": "jpg"}.get(field.lower(), field.lower())
