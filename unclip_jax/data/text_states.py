"""States of a frozen text encoder on disk: `unclip embed --t5` writes them, and Imagen trains from them.

    manifest.json     the encoder's hash, its tokenizer and width, the source's checksum, counts; written last
    plan.json         what decides the contents: a folder can be continued only with the same plan
    empty/            the empty caption: `states` float16 (n, W)
    00000/ 00001/     one shard each, of n consecutive records of the source with their m captions:
        states        float16 (tokens, W), of the captions' own tokens alone, one caption after the other
        state_end     (m,): where each caption ends in `states`
        first_caption (n + 1,): the captions of record i are first_caption[i] ... first_caption[i + 1] - 1
        captions      (m,) uint64: the first eight bytes of the sha256 of each caption
        shard.json    counts, sha256 of every file

A record that cannot be read has no captions. Arrays are read through memory maps.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os

import numpy as np

from unclip_jax.data.embeddings import EMPTY, read_array, read_json, shard_path
from unclip_jax.data.record import Record, Source, json_checksum
from unclip_jax.errors import InputError
from unclip_jax.paths import store_errors, user_path
from unclip_jax.typed import check_fields

FORMAT_VERSION = 1
OPEN_SHARDS = 2048  # shards whose files stay mapped
MANIFEST = {
    "format_version": (int, True),
    "t5": (str, True),
    "source": (str, True),
    "records": (int, True),
    "shard_records": (int, True),
    "dtype": (str, True),
    "width": (int, True),
    "tokenizer": (dict, True),
    "captions": (int, True),
    "bad": (int, True),
    "cut": (int, True),
}


@dataclasses.dataclass(frozen=True)
class TextStates:
    """The description of a folder.

    path: the folder. encoder: the hash of the T5. source: the checksum of the source. width: W. tokenizer:
    the encoder's. empty: (n, W) float16. records, shard_records: of the source, and of a shard.
    """

    path: str
    encoder: str
    source: str
    width: int
    tokenizer: dict
    records: int
    shard_records: int
    empty: np.ndarray = dataclasses.field(repr=False, compare=False)


def is_text_states(path: str | os.PathLike) -> bool:
    """Whether a path is a folder of states."""
    with store_errors(path):
        manifest = user_path(path) / "manifest.json"
        return manifest.is_file() and "t5" in read_json(manifest)


def open_text_states(path: str | os.PathLike) -> TextStates:
    """The description of a folder of states.

    Raises:
      FileNotFoundError, ValueError: when it is none, is not finished, or is damaged.
    """
    folder = user_path(path)
    manifest = read_json(folder / "manifest.json")
    check_fields(manifest, MANIFEST, f"{folder}/manifest.json")
    if manifest["format_version"] != FORMAT_VERSION:
        raise InputError(f"{folder}/manifest.json has another format version than {FORMAT_VERSION}")
    names = ("t5", "source", "width", "tokenizer", "records", "shard_records")
    return TextStates(str(path), *(manifest[name] for name in names), read_array(folder / EMPTY, "states"))


def caption_hash(caption: str) -> np.uint64:
    """What a folder keeps of a caption, to find out a source whose captions have changed."""
    return np.frombuffer(hashlib.sha256(caption.encode("utf-8", "surrogatepass")).digest()[:8], np.uint64)[0]


def with_text_states(source: Source, path: str | os.PathLike) -> Source:
    """The records of a source, each with the states of its captions: `embeds["text_states"]` is a tuple with
    an array (tokens, W) for each caption.

    Raises:
      FileNotFoundError, ValueError: as `open_text_states`; also if the folder was made of another source.
    """
    states = open_text_states(path)
    if source.embedded is not None:
        raise InputError(f"{source.name} holds embeddings: leave out its key 'text_states'")
    if states.source != source.checksum:
        raise InputError(f"{path} holds the states of another source than {source.name}: embed it again")

    @functools.lru_cache(OPEN_SHARDS)
    def opened(number: int) -> dict[str, np.ndarray]:
        folder = shard_path(path, number)
        names = ("states", "state_end", "first_caption", "captions")
        return {name: read_array(folder, name) for name in names}

    def fetch(i: int) -> Record:
        record, shard = source.fetch(i), opened(i // states.shard_records)
        at = i % states.shard_records
        rows = range(int(shard["first_caption"][at]), int(shard["first_caption"][at + 1]))
        if [int(shard["captions"][row]) for row in rows] != [int(caption_hash(c)) for c in record.captions]:
            raise InputError(f"record {i} of {source.name} has other captions than its states in {path}")
        ends = [int(shard["state_end"][row - 1]) if row else 0 for row in (*rows, rows.stop)]
        found = tuple(shard["states"][a:b] for a, b in zip(ends[:-1], ends[1:]))
        return dataclasses.replace(record, embeds={"text_states": found})

    checksum = json_checksum([source.checksum, states.encoder])
    return dataclasses.replace(source, checksum=checksum, fetch=fetch, text_states=states)


def padded(states: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """States (n, W) as a row: float32 (L, W), zero behind the caption, and its mask (L,)."""
    row = np.zeros((length, states.shape[1]), np.float32)
    row[: len(states)] = states
    return row, np.arange(length) < len(states)
