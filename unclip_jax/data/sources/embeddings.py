"""What `unclip embed` made of another source: the priors and the codec train from it, without the images."""

from __future__ import annotations

import functools

import numpy as np

from unclip_jax.data.embeddings import Shard, open_embedded, read_json, shard_path
from unclip_jax.data.record import Record, Source, json_checksum
from unclip_jax.errors import InputError

OPEN_EMBEDDED = 2048  # shards whose files stay mapped; a process may have about 65,000 maps


def embeddings_source(path: str) -> Source:
    """The images and captions of a folder of embeddings (`data.embeddings` describes it), in their order.

    Raises `FileNotFoundError` or `ValueError` if the folder is not one of embeddings, or lacks a shard.
    """
    embedded = open_embedded(path)
    for number, described in enumerate(embedded.shards):
        folder = shard_path(embedded.path, number)
        if read_json(folder / "shard.json").get("sha256") != described["sha256"]:
            manifest = f"{embedded.path}/manifest.json"
            raise InputError(
                f"{folder} is not the shard that {manifest} describes: copy the embeddings again"
            )

    @functools.lru_cache(OPEN_EMBEDDED)
    def opened(number: int) -> Shard:
        return Shard(shard_path(embedded.path, number), embedded.states)

    ends = np.cumsum([shard["images"] for shard in embedded.shards])

    def fetch(i: int) -> Record:
        number = int(np.searchsorted(ends, i, side="right"))
        shard, row = opened(number), i - int(ends[number - 1] if number else 0)
        return Record(str(i), b"", shard.captions(row), {}, str(shard.folder), shard.row(row))

    checksum = json_checksum([shard["sha256"] for shard in embedded.shards])
    return Source(f"embeddings:{path}", checksum, 0, int(ends[-1]), fetch, embedded)
