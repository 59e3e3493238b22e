"""What every data source yields: `Record`, one captioned image, and `Source`, an indexed array of records.

The functions are shared by the formats: they read captions and metadata, form checksums, shorten errors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
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
      embeds: CLIP's embeddings of the image and of each caption (see `embeddings.Shard.row`), if the source
        holds them.
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
      embedded: describes the embeddings of a source that holds embeddings; None for a source without them.
      pictures: False for a source that holds embeddings alone.
      text_states: describes the states of its captions (`text_states.TextStates`); None without them.
    """

    name: str
    checksum: str
    n_filtered: int
    length: int
    fetch: Callable[[int], Record] = dataclasses.field(repr=False)
    embedded: Embedded | None = None
    pictures: bool = True
    text_states: Any = None

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


def parse_metadata(data: Any) -> dict:
    """The metadata that a shard stores beside an image, from the bytes of a JSON object.

    Raises `ValueError` for anything else, and for an object that has the same key twice.
    """
    if not isinstance(data, bytes):
        raise InputError(f"the metadata is {type_in_words(data)}, expected the bytes of a JSON object")
    try:
        meta = json.loads(data, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the metadata is not JSON ({error_summary(error)})") from error
    if not isinstance(meta, dict):
        raise InputError(f"the metadata is {type_in_words(meta)}, expected a JSON object")
    return meta


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise InputError(f"the key {key!r} comes twice")
        values[key] = value
    return values


# ------------------------------------------------------------------------------------------------------------
# Captions
# ------------------------------------------------------------------------------------------------------------
def parse_captions(meta: Mapping, text: Any) -> tuple[str, ...]:
    """The captions of a record: `captions` of the metadata if it has any, else `text`, else its `caption`.

    Args:
      meta: the record's metadata.
      text: what the shard stores as `txt`; None if it stores none.

    Each of the three is a text or a list of texts (`caption_texts`).
    """
    for given in (meta.get("captions"), text, meta.get("caption")):
        captions = caption_texts(given)
        if captions:
            return captions
    return ()


def caption_texts(given: Any) -> tuple[str, ...]:
    """The captions in a value of a file: a text or a list of texts, each a string or bytes in UTF-8.

    None, NaN and blank texts are no captions. Every source reads its captions through this function.

    Raises `ValueError` for any other type, and for bytes that are not UTF-8.
    """
    items = given if isinstance(given, (list, tuple)) else [given]
    texts = (_caption_text(item) for item in items)
    return tuple(text for text in texts if text.strip())


def _caption_text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            place = f"byte {value[error.start]:#04x} at position {error.start}"
            raise InputError(f"a caption is not UTF-8 ({place}): save it as UTF-8") from None
    if not isinstance(value, str):
        raise InputError(f"a caption is {type_in_words(value)}, expected a text")
    if "\0" in value:
        raise InputError("a caption holds a NUL character (is it UTF-16?): save it as UTF-8")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("a caption holds half of a surrogate pair: save it as UTF-8") from None
    return value


def plain_value(value: Any) -> Any:
    """A value of the metadata: bytes in UTF-8 become text; bytes that are no text, and the rest, stay."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value


def class_of(meta: Mapping, field: str) -> str:
    """A field of the metadata that names a class or a concept, as text; "" if it is missing, null or NaN.

    Raises `ValueError` if it is neither a text nor a number.
    """
    value = plain_value(meta.get(field))
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, (str, int, float)):
        raise InputError(f"its {field} is {type_in_words(value)}, expected a text or a number")
    return str(value).strip()


def label_of(record: Record, label: str) -> str:
    """The name of a record's class. Underscores in folder names become spaces.

    label: `caption`, `folder` or a field of the metadata (table in `evaluate.clip`).

    Raises:
      ValueError: if the record has no class.
    """
    if label == "caption":
        name = record.captions[0] if record.captions else ""
    elif label == "folder":
        name = PurePosixPath(record.key).parent.name.replace("_", " ")
    else:
        name = class_of(record.meta, label)
    if not name:
        raise InputError(
            f"record {record.key} of {record.shard} has no {label}; "
            "label is caption, folder, or a field of the metadata"
        )
    return name


def type_in_words(value: Any) -> str:
    """What a value of a file is, for a message: "a list", "an int (7)"."""
    name = type(value).__name__
    shown = f" ({value!r})" if isinstance(value, (bool, int, float)) else ""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}{shown}"
