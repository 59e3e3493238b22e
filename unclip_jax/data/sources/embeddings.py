"""What `unclip embed` made of another source.

The priors and the codec train from it without the images (`embeddings_source`). The decoder needs the images
too (`with_embeddings`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from unclip_jax.data.embeddings import Embedded, Shard, open_embedded, read_array, read_json, shard_path
from unclip_jax.data.record import Record, Source, json_checksum
from unclip_jax.errors import InputError

OPEN_EMBEDDED = 2048  # shards whose files stay mapped; a process may have about 65,000 maps


def embeddings_source(path: str) -> Source:
    """The images and captions of a folder of embeddings (`data.embeddings` describes it), in their order.

    Raises `FileNotFoundError` or `ValueError` if the folder is not one of embeddings, or lacks a shard.
    """
    embedded = _open_checked(path)
    find = _finder(embedded)

    def fetch(i: int) -> Record:
        shard, row = find(i)
        return Record(str(i), b"", shard.captions(row), {}, str(shard.folder), shard.row(row))

    length = sum(shard["images"] for shard in embedded.shards)
    return Source(f"embeddings:{path}", _checksum(embedded), 0, length, fetch, embedded, pictures=False)


def with_embeddings(source: Source, path: str) -> Source:
    """The records of a source of images, each with the embeddings that a folder holds of it.

    Raises:
      FileNotFoundError, ValueError: as `embeddings_source`; also if the folder was made of another source, or
        if this one holds embeddings already.
    """
    embedded = _open_checked(path)
    if source.embedded is not None:
        raise InputError(f"{source.name} holds embeddings already: leave out its key 'embeddings'")
    if embedded.source != source.checksum:
        raise InputError(
            f"{path} holds the embeddings of another source than {source.name}: embed {source.name} again"
        )
    find = _finder(embedded)
    folders = [shard_path(embedded.path, number) for number in range(len(embedded.shards))]
    records = np.concatenate([np.asarray(read_array(folder, "record")) for folder in folders])

    def fetch(i: int) -> Record:
        record = source.fetch(i)
        position = int(np.searchsorted(records, i))
        if position == len(records) or records[position] != i:
            raise InputError(f"record {i} of {source.name} has no embedding in {path}")
        shard, row = find(position)
        if shard.captions(row) != record.captions:
            raise InputError(f"record {i} of {source.name} has other captions than its embeddings in {path}")
        return dataclasses.replace(record, embeds=shard.row(row))

    checksum = json_checksum([source.checksum, _checksum(embedded)])
    return dataclasses.replace(source, checksum=checksum, fetch=fetch, embedded=embedded)


def _open_checked(path: str) -> Embedded:
    # The description of a folder whose shards are those that its manifest lists.
    embedded = open_embedded(path)
    for number, described in enumerate(embedded.shards):
        folder = shard_path(embedded.path, number)
        if read_json(folder / "shard.json").get("sha256") != described["sha256"]:
            manifest = f"{embedded.path}/manifest.json"
            raise InputError(
                f"{folder} is not the shard that {manifest} describes: copy the embeddings again"
            )
    return embedded


def _checksum(embedded: Embedded) -> str:
    return json_checksum([shard["sha256"] for shard in embedded.shards])


def _finder(embedded: Embedded) -> Callable[[int], tuple[Shard, int]]:
    # The position of an image in the folder -> its shard, and its row there.
    @functools.lru_cache(OPEN_EMBEDDED)
    def opened(number: int) -> Shard:
        kept = (x is not None for x in (embedded.latents, embedded.neighbours, embedded.codes))
        return Shard(shard_path(embedded.path, number), embedded.states, *kept)

    ends = np.cumsum([shard["images"] for shard in embedded.shards])

    def find(i: int) -> tuple[Shard, int]:
        number = int(np.searchsorted(ends, i, side="right"))
        return opened(number), i - int(ends[number - 1] if number else 0)

    return find
