"""Any prepared dataset of TensorFlow Datasets (TFDS)."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from unclip_jax.data.filters import Filters, as_filters, filter_rows, no_records_message, trim_captions
from unclip_jax.data.index import (
    INDEX_VERSION,
    build_index,
    cached_index,
    file_stamps,
    index_checksum,
    sharded_source,
)
from unclip_jax.data.record import Record, Source, caption_texts, error_summary, json_checksum, plain_value
from unclip_jax.data.sources.tfrecord import find_records
from unclip_jax.data.tensorflow import import_tfds
from unclip_jax.errors import InputError


def tfds_source(
    builder: str,
    split: str = "train",
    image_key: str = "image",
    caption_key: str | None = "caption",
    data_dir: str | None = None,
    *,
    filters: Mapping | Filters | None = None,
    cache_dir: str | None = None,
) -> Source:
    """The examples of a prepared TFDS builder.

    Records are reached in one of three ways:

    1. If the dataset is stored in a random-access format: through `as_data_source`.
    2. Else, if it is stored as TFRecord shards: through an index, like `tfrecord_source`.
    3. Else (another format, or `tfds.testing.mock_data`): one pass holds the split's examples in memory, with
       encoded images. This suits small data only.

    Args:
      builder: the builder's name.
      split: a split in TFDS's notation, for example "train[:10%]".
      image_key: the feature that holds the image: "image", or "pair/left" or "pair.left" for a nested one.
      caption_key: the feature that holds the captions: a text, a list of texts, or a class label, whose name
        becomes the caption. None means no captions. Scalar features become the record's metadata.
      data_dir: where the dataset is stored; None for TFDS's default.
      filters: which records to keep.
      cache_dir: where the index is cached; None for the default folder.

    Raises `ValueError` with one line for an unknown builder, split or feature, or a dataset not prepared.
    """
    library = import_tfds()
    try:
        built = library.builder(builder, data_dir=data_dir)
    except Exception as error:
        raise InputError(f"cannot open TFDS builder {builder!r}: {error_summary(error)}") from error
    data = _Dataset(library, built, split, _feature_path(image_key), _feature_path(caption_key or ""))
    image_feature = _find_feature(built.info.features, data.image_path, builder, "image_key")
    caption_feature = None
    if caption_key:
        caption_feature = _find_feature(built.info.features, data.caption_path, builder, "caption_key")
    filters = as_filters(filters)
    decoders = _decoders(library, image_feature, data.image_path)

    def to_record(example: Mapping, i: int) -> Record:
        return _to_record(example, i, data, caption_feature)

    fetch_example, total = _open_examples(data, decoders)
    if fetch_example is None:
        features = built.info.features

        def parse(example: bytes, path: str) -> Record:
            return to_record(features.deserialize_example_np(example, decoders=decoders or None), 0)

        return _tfrecord_dataset(data, parse, [image_key, caption_key], filters, cache_dir)

    def read(i: int) -> Record:
        return to_record(fetch_example(i), i)

    kept = filter_rows(read, total, filters)
    if not len(kept):
        raise InputError(no_records_message(data.name, total, filters))
    checksum = json_checksum([data.name, total, hashlib.sha256(kept.tobytes()).hexdigest()])

    def fetch(i: int) -> Record:
        return trim_captions(read(int(kept[i])), filters)

    return Source(data.name, checksum, total - len(kept), len(kept), fetch)


@dataclasses.dataclass(frozen=True)
class _Dataset:
    """A builder of TFDS, one of its splits, and the features that hold image and captions (() for none)."""

    library: Any
    built: Any
    split: str
    image_path: tuple[str, ...]
    caption_path: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"tfds:{self.built.info.full_name}/{self.split}"


# ------------------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------------------
def _open_examples(data: _Dataset, decoders: Mapping) -> tuple[Callable[[int], Mapping] | None, int]:
    # (a function that reads example i, the number of examples), or (None, 0) if the dataset's TFRecord shards
    # are to be indexed instead.
    library, built = data.library, data.built
    formats = built.info.available_file_formats() | {built.info.file_format}
    try:
        if formats & set(library.core.FileFormat.with_random_access()) and built.info.splits:
            examples = built.as_data_source(split=data.split, decoders=decoders or None)
            lock = threading.Lock()  # the readers open their files when first used, and nothing guards that

            def fetch(i: int) -> Mapping:
                with lock:
                    return examples[i]

            return fetch, len(examples)
        if built.info.file_format == library.core.FileFormat.TFRECORD and built.info.splits:
            return None, 0
        dataset = built.as_dataset(split=data.split, decoders=decoders or None, shuffle_files=False)
        in_memory = list(library.as_numpy(dataset))
        return in_memory.__getitem__, len(in_memory)
    except Exception as error:
        raise InputError(_unreadable_message(data, error)) from error


def _tfrecord_dataset(
    data: _Dataset,
    parse: Callable[[bytes, str], Record],
    keys: list[str | None],
    filters: Filters,
    cache_dir: str | None,
) -> Source:
    # The source of a dataset that is stored as TFRecord shards; `keys` names the features that `parse` reads.
    try:
        instructions = data.built.info.splits[data.split].file_instructions
    except Exception as error:
        raise InputError(_unreadable_message(data, error)) from error
    # The ranges of examples that the split takes from each shard. "train[:10%]+train[90%:]" takes two.
    ranges: dict[str, list] = {}
    for item in instructions:
        last = None if item.take < 0 else item.skip + item.take
        ranges.setdefault(os.fspath(item.filename), []).append((item.skip, last))
    shards = list(ranges)

    def find_in_split(path: str) -> np.ndarray:
        spans = find_records(path)
        return np.concatenate([spans[first:last] for first, last in ranges[path]])

    stamps = file_stamps(shards)
    key = json_checksum(
        ["tfds", INDEX_VERSION, stamps, sorted(ranges.items()), *keys, dataclasses.asdict(filters)]
    )
    index = cached_index(key, lambda: build_index(shards, find_in_split, parse, filters), cache_dir)
    sizes = [[os.path.basename(shard), size] for shard, size, _ in stamps]
    checksum = json_checksum([data.name, sizes, index_checksum(index)])
    source = sharded_source(data.name, shards, index, parse, filters, checksum)

    def fetch(i: int) -> Record:
        return dataclasses.replace(source.fetch(i), key=f"{data.split}/{i}")

    return dataclasses.replace(source, fetch=fetch)


def _unreadable_message(data: _Dataset, error: Exception) -> str:
    built = data.built
    if not built.info.splits:
        advice = f"run `tfds build {built.name}`, or set data_dir"
        return f"TFDS {built.name!r} is not prepared in {built.data_dir}: {advice}"
    known = ", ".join(sorted(built.info.splits))
    return f"cannot read split {data.split!r} of TFDS {built.name!r} (it has {known}): {error_summary(error)}"


# ------------------------------------------------------------------------------------------------------------
# Features
# ------------------------------------------------------------------------------------------------------------
def _feature_path(key: str) -> tuple[str, ...]:
    return tuple(key.replace(".", "/").split("/")) if key else ()


def _find_feature(features: Any, path: tuple[str, ...], builder: str, argument: str) -> Any:
    feature = features
    for part in path:
        feature = getattr(feature, "feature", feature)  # a Sequence of a dict is searched like the dict
        try:
            feature = feature[part]
        except (KeyError, TypeError):
            known = ", ".join(sorted(features))
            wanted = "/".join(path)
            raise InputError(
                f"TFDS {builder!r} has no feature {wanted!r}: set {argument} to one of {known}"
            ) from None
    return feature


def _decoders(library: Any, image_feature: Any, image_path: tuple[str, ...]) -> Any:
    # Leaves images encoded: the pipeline's workers decode them, and a damaged image stays one bad record.
    if not isinstance(image_feature, library.features.Image):
        return {}
    decoders = library.decode.SkipDecoding()
    for part in reversed(image_path):
        decoders = {part: decoders}
    return decoders


def _to_record(example: Mapping, i: int, data: _Dataset, caption_feature: Any) -> Record:
    image = _walk(example, data.image_path)
    if not (isinstance(image, np.ndarray) and image.dtype.kind in "ui" and image.ndim > 1):
        image = _as_bytes(image)
    captions = _as_captions(_walk(example, data.caption_path), caption_feature) if data.caption_path else ()
    scalars = {
        field: value
        for field, value in example.items()
        if np.ndim(value) == 0 and not isinstance(value, Mapping)
    }
    meta = {field: _plain(value) for field, value in scalars.items() if field != data.image_path[0]}
    return Record(f"{data.split}/{i}", image, captions, meta, data.name)


def _walk(example: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        example = [item[part] for item in example] if isinstance(example, (list, tuple)) else example[part]
    return example


def _as_bytes(image: Any) -> bytes:
    image = image.item() if isinstance(image, (np.ndarray, np.generic)) else image
    if not isinstance(image, bytes):
        raise InputError(
            f"the image feature holds {type(image).__name__}, expected encoded bytes or an array"
        )
    return image


def _as_captions(value: Any, feature: Any) -> tuple[str, ...]:
    names = getattr(feature, "int2str", None) or getattr(getattr(feature, "feature", None), "int2str", None)
    items = np.asarray(value, object).reshape(-1).tolist()
    if names is not None:
        items = [
            names(int(item)).replace("_", " ") if isinstance(item, (int, np.integer)) else item
            for item in items
        ]
    return caption_texts(items)


def _plain(value: Any) -> Any:
    return plain_value(value.item() if isinstance(value, (np.ndarray, np.generic)) else value)
