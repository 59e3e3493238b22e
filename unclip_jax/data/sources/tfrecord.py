"""TFRecord shards of `tf.train.Example`, as img2dataset writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unclip_jax.data import tfrecord
from unclip_jax.data.filters import Filters
from unclip_jax.data.index import indexed_source
from unclip_jax.data.record import (
    IMAGE_KEYS,
    Record,
    Source,
    parse_captions,
    parse_metadata,
    plain_value,
    type_in_words,
)
from unclip_jax.data.tensorflow import open_remote
from unclip_jax.errors import InputError
from unclip_jax.paths import is_remote


def tfrecord_source(
    pattern: str | Sequence[str], *, filters: Mapping | Filters | None = None, cache_dir: str | None = None
) -> Source:
    """The records of all TFRecord shards that match `pattern`, a glob or a list of globs.

    The features of a record are `key`, one of jpg | jpeg | png | webp (the encoded image), `txt`, and the
    metadata, either as `json` (bytes) or as further features. Captions are the metadata's list `captions` if
    it has one, else `txt`, else the metadata's `caption`.

    Raises:
      FileNotFoundError: if nothing matches.
      ValueError: for broken framing (naming the shard), or if the filters keep nothing.
    """
    return indexed_source("tfrecord", pattern, find_records, parse_tfrecord, filters, cache_dir)


def find_records(path: str) -> np.ndarray:
    """(offset, length) in bytes of every record of a TFRecord file, local or in a store: int64 (N, 2)."""
    if not is_remote(path):
        return tfrecord.index_records(path)
    with open_remote(path) as file:
        return tfrecord.index_records(file)


def parse_tfrecord(data: bytes, path: str) -> Record:
    """The record of a `tf.train.Example`. Raises `ValueError` if it is malformed or has no image."""
    features = tfrecord.decode_example(data)
    encoding = next((key for key in IMAGE_KEYS if features.get(key)), None)
    if encoding is None:
        known = ", ".join(IMAGE_KEYS)
        raise InputError(
            f"the record has no image: expected one of the features {known}, it has {sorted(features)[:12]}"
        )
    if features.get("json"):
        meta = parse_metadata(_single("json", features["json"]))
    else:
        others = (*IMAGE_KEYS, "txt", "key", "json")
        meta = {name: _plain_feature(values) for name, values in features.items() if name not in others}
    key = _single("key", features["key"]) if features.get("key") else str(meta.get("key", ""))
    key = key.decode("utf-8", "backslashreplace") if isinstance(key, bytes) else str(key)
    image = _single(encoding, features[encoding])
    if not isinstance(image, bytes):
        raise InputError(
            f"the feature {encoding!r} is {type_in_words(image)}, expected the bytes of an image"
        )
    return Record(key, image, parse_captions(meta, features.get("txt")), meta, path)


def _single(name: str, values: list) -> Any:
    if len(values) != 1:
        raise InputError(f"the feature {name!r} has {len(values)} values, expected one")
    return values[0]


def _plain_feature(values: list) -> Any:
    # Bytes that are no text stay bytes.
    plain = [plain_value(value) for value in values]
    return plain[0] if len(plain) == 1 else plain
