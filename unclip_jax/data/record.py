"""What every data source yields: `Record`, one captioned image, and `Source`, an indexed array of records.

The functions are shared by the formats: they read captions and metadata, form checksums, shorten errors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from unclip_jax.data.embeddings import Embedded
from unclip_jax.errors import InputError

# The names under which shards hold an encoded image, in order of preference.
IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")


@dataclasses.dataclass(frozen=True)
class Record:
    """One captioned image.

    Attributes:
      key: the record's name in its shard; may be empty.
      image: encoded bytes, or a decoded array (H, W) or (H, W, C). Empty bytes in the `embeddings` source.
      captions: the texts of the image; may be empty.
      meta: the metadata, a flat dict of JSON values.
      shard: the file or folder that holds the record.
      embeds: only in the `embeddings` source: CLIP's embeddings of the image and of each caption
        (see `embeddings.Shard.row`).
    """

    key: str
    image: bytes | np.ndarray
    captions: tuple[str, ...]
    meta: dict
    shard: str
    embeds: Mapping[str, np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """An indexed dataset: `len(source)` records, and `source.read(i) -> Record` from any thread.

    Attributes:
      name: what messages call this source.
      checksum: sha256 in hex. It identifies the contents and does not depend on where they are stored.
      n_filtered: how many records the filters dropped.
      length: how many records remain.
      fetch: reads one record by its number, without a check of the range.
      embedded: describes the embeddings of a source that holds embeddings; None for a source of images.
    """

    name: str
    checksum: str
    n_filtered: int
    length: int
    fetch: Callable[[int], Record] = dataclasses.field(repr=False)
    embedded: Embedded | None = None

    def __len__(self) -> int:
        return self.length

    def read(self, i: int) -> Record:
        """Record i. Raises `IndexError` outside [0, len), `ValueError` or `OSError` for a damaged record."""
        if not 0 <= i < self.length:
            raise IndexError(f"record {i} is outside {self.name}, which has {self.length} records")
        return self.fetch(int(i))


def error_summary(error: BaseException) -> str:
    """The first line of an error's text, at most 300 characters, for use inside a message of one line."""
    text = f"no {error.args[0]!r}" if isinstance(error, KeyError) and error.args else str(error)
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line[:300] or type(error).__name__


def json_checksum(value: Any) -> str:
    """The sha256 (hex) of a value of JSON types: the checksum of a source, the name of a cached index."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def parse_metadata(data: bytes) -> dict:
    """The metadata that a shard stores beside an image. Raises `ValueError` unless it is a JSON object."""
    try:
        meta = json.loads(data)
    except ValueError as error:
        raise InputError(f"the metadata is not JSON ({error_summary(error)})") from error
    if not isinstance(meta, dict):
        raise InputError(f"the metadata is a JSON {type(meta).__name__}, expected an object")
    return meta


def parse_captions(meta: Mapping, text: bytes | None) -> tuple[str, ...]:
    """The captions of a record: `captions` of the metadata if it has any, else `text`, else its `caption`.

    Args:
      meta: the record's metadata; `captions` is a text or a list of texts.
      text: what the shard stores as `txt`, in UTF-8; None if it stores none.
    """
    listed = meta.get("captions")
    if isinstance(listed, str):
        listed = [listed]
    if listed:
        return tuple(str(caption) for caption in listed)
    if text is not None:
        return (text.decode("utf-8", "replace"),)
    return (meta["caption"],) if isinstance(meta.get("caption"), str) else ()
