"""Where captioned images come from: every source is an indexed, thread-safe array of records.

A source is indexed once: (shard, offset, length) of every record that passes the filters. The index is cached beside a checksum,
so that a later run, or a resumed one, starts at any record at once. `SOURCES` lists the kinds; `make_source` builds one from a config:

    make_source({"name": "tfrecord", "pattern": "gs://bucket/laion/*.tfrecord", "filters": {"min_side": 256}})

Paths with "://" are read through `tf.io.gfile`; nothing else here needs TensorFlow (a `tfds` source needs tensorflow-datasets).
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import inspect
import io
import json
import logging
import math
import os
import tarfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from unclip_jax.data import ops, tfrecord
from unclip_jax.data.embeddings import Embedded, Shard, open_embedded, read_json, shard_path
from unclip_jax.paths import cache_folder, is_remote, store_errors, user_path, write_whole

log = logging.getLogger(__name__)

EMOJI_FOLDER = Path(__file__).parent / "emoji"
IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
INDEX_VERSION = 1  # part of every cache key: raise it when the meaning of an index changes
OPEN_FILES = 256  # shards kept open per source; beyond, a shard is opened for every read
OPEN_EMBEDDED = 2048  # shards of embeddings whose files stay mapped; a process may have some 65,000 maps


@dataclasses.dataclass(frozen=True)
class Record:
    """One captioned image: `image` is encoded bytes or a decoded array (H, W[, C]), `captions` may be empty, `meta` is flat JSON. Of the
    `embeddings` source the image is empty, and `embeds` holds what CLIP makes of it and of each caption (`embeddings.Shard.row`)."""

    key: str
    image: bytes | np.ndarray
    captions: tuple[str, ...]
    meta: dict
    shard: str
    embeds: Mapping[str, np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Filters:
    """Which records an index keeps. Nothing is filtered by default.

    min_side: the shorter side, in pixels, is at least this. max_aspect: longer side / shorter side is at most this. Sizes are the
    metadata's `width` and `height` if there, else the image header's. min_caption_chars, max_caption_chars: captions outside are not
    used, and a record left without captions is dropped. scores: {field: (lowest, highest)} on numbers in the metadata, None for an
    open end; a record without the field is dropped.
    """

    min_side: int = 0
    max_aspect: float | None = None
    min_caption_chars: int = 0
    max_caption_chars: int | None = None
    scores: Mapping[str, tuple[float | None, float | None]] = dataclasses.field(default_factory=dict)

    @property
    def active(self) -> bool:
        return self != Filters()

    @property
    def needs_size(self) -> bool:
        return self.min_side > 0 or self.max_aspect is not None


@dataclasses.dataclass(frozen=True)
class Source:
    """An indexed dataset: `len(source)` records, `source.read(i) -> Record` from any thread.

    `checksum` (sha256, hex) identifies the contents and does not depend on where they lie; `n_filtered` counts the records the filters
    dropped. `read` raises `IndexError` outside [0, len), and `ValueError` or `OSError` for a damaged record. `embedded` describes
    the embeddings of a source that holds some, None for pictures.
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
        if not 0 <= i < self.length:
            raise IndexError(f"record {i} is outside {self.name}, which has {self.length} records")
        return self.fetch(int(i))


@dataclasses.dataclass(frozen=True)
class Index:
    """Where N records lie: shard int32 (N,), offset and length int64 (N,) in bytes, and how many more the filters dropped."""

    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    n_filtered: int


def one_line(error: BaseException) -> str:
    """The first line of an error's text, at most 300 characters: what a one-line message quotes."""
    text = f"no {error.args[0]!r}" if isinstance(error, KeyError) and error.args else str(error)
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line[:300] or type(error).__name__


# ----------------------------------------------------------------------------------------------------------------------
# The kinds of source
# ----------------------------------------------------------------------------------------------------------------------
def emoji(split: str = "train", *, filters: Mapping | Filters | None = None) -> Source:
    """The dataset that ships with the package: 64x64 emoji drawings with captions. `split` is "train", "val" or "compose".

    Raises `ValueError` for another split, `FileNotFoundError` if the package was installed without its data.
    """
    splits = ("train", "val", "compose")
    if split not in splits:
        raise ValueError(f"unknown split {split!r} of the emoji data: choose one of {', '.join(splits)}")
    shards = sorted(str(path) for path in EMOJI_FOLDER.glob(f"{split}-*-of-*.tfrecord"))
    manifest = EMOJI_FOLDER / "manifest.json"
    if not shards or not manifest.exists():
        raise FileNotFoundError("the embedded emoji data is missing from unclip_jax/data/emoji: install the package again")
    filters = _as_filters(filters)
    index = _build_index(shards, tfrecord.index_records, _parse_tfrecord, filters)
    text = manifest.read_bytes()
    checksum = json.loads(text).get("checksum") or hashlib.sha256(text).hexdigest()
    if filters.active:
        checksum = _digest([checksum, dataclasses.asdict(filters)])
    return _sharded_source(f"emoji/{split}", shards, index, _parse_tfrecord, filters, checksum)


def tfrecord_shards(pattern: str | Sequence[str], *, filters: Mapping | Filters | None = None, cache_dir: str | None = None) -> Source:
    """TFRecord shards of `tf.train.Example` as img2dataset writes them; `pattern` is a glob or a list of globs.

    Features: `key`, one of jpg | jpeg | png | webp (encoded bytes), `txt`, and metadata either as `json` (bytes) or as further
    features. Captions are the metadata's `captions` list if there, else `txt`, else its `caption`.

    Raises `FileNotFoundError` if nothing matches, `ValueError` for broken framing (naming the shard) or if the filters keep nothing.
    """
    return _indexed("tfrecord", pattern, _tfrecord_spans, _parse_tfrecord, filters, cache_dir)


def webdataset(pattern: str | Sequence[str], *, filters: Mapping | Filters | None = None, cache_dir: str | None = None) -> Source:
    """Uncompressed tar shards as img2dataset and webdataset write them; `pattern` is a glob or a list of globs.

    Consecutive members `<key>.<field>` are one record: jpg | jpeg | png | webp, `txt`, `json`. Captions as for `tfrecord`.

    Raises as `tfrecord`; a compressed tar is refused, since it cannot be read from the middle.
    """
    return _indexed("webdataset", pattern, _tar_spans, _parse_tar, filters, cache_dir)


def folder(path: str, *, filters: Mapping | Filters | None = None, cache_dir: str | None = None) -> Source:
    """Images below `path`, at any depth, each with a text of the same name beside it: fox.png, fox.txt; one caption per line.

    An image without a text has no captions. Raises `FileNotFoundError` if there is no such folder or no image in it.
    """
    root = user_path(path)
    with store_errors(path):
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {str(path)!r}: check the path of the folder source")
        found = sorted(root.walk()) if is_remote(path) else os.walk(root)
    images, texts = [], []
    for current, folders, files in found:
        folders.sort()
        names = set(files)
        for file in sorted(files):
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in IMAGE_SUFFIXES:
                images.append(os.path.join(current, file))
                texts.extend([os.path.join(current, stem + ".txt")] if stem + ".txt" in names else [])
    if not images:
        raise FileNotFoundError(f"no image in folder {str(path)!r}: expected files ending in {', '.join(IMAGE_SUFFIXES)}")

    def parse(data: bytes, image_path: str) -> Record:
        text = user_path(image_path).with_suffix(".txt")
        with store_errors(text):
            lines = text.read_text("utf-8").splitlines() if text.exists() else []
        captions = tuple(line.strip() for line in lines if line.strip())
        return Record(os.path.relpath(image_path, root), data, captions, {}, str(root))

    filters = _as_filters(filters)
    stamps = _stat(images + texts)
    build = lambda: _build_index(images, lambda path: np.array([[0, _stat([path])[0][1]]], np.int64), parse, filters)  # noqa: E731
    key = _digest(["folder", INDEX_VERSION, stamps, dataclasses.asdict(filters)])
    index = _cached_index(key, build, cache_dir) if filters.active else build()
    checksum = _digest([[[os.path.relpath(name, root), size] for name, size, _ in stamps], _index_digest(index)])
    return _sharded_source(f"folder:{path}", images, index, parse, filters, checksum)


def tfds(
    builder: str,
    split: str = "train",
    image_key: str = "image",
    caption_key: str | None = "caption",
    data_dir: str | None = None,
    *,
    filters: Mapping | Filters | None = None,
    cache_dir: str | None = None,
) -> Source:
    """Any prepared TensorFlow Datasets builder by name, with the names of its features: "image", "captions/text" or "captions.text".

    `split` is TFDS's notation, e.g. "train[:10%]". A caption feature may be a text, a list of texts or a class label (its name is the
    caption); None means no captions. Scalar features become the record's metadata.

    How records are reached: through `as_data_source` if the dataset is stored in a random-access format; else its TFRecord shards are
    indexed like any other; else (another format, or `tfds.testing.mock_data`) one pass holds the split's examples in memory, images
    encoded, which suits small data only.

    Raises `ValueError` with one line for an unknown builder, split or feature, and for a dataset that is not prepared.
    """
    library = _import_tfds()
    try:
        built = library.builder(builder, data_dir=data_dir)
    except Exception as error:
        raise ValueError(f"cannot open TFDS builder {builder!r}: {one_line(error)}") from error
    features = built.info.features
    image_path, caption_path = _feature_path(image_key), _feature_path(caption_key) if caption_key else ()
    image_feature = _find_feature(features, image_path, builder, "image_key")
    caption_feature = _find_feature(features, caption_path, builder, "caption_key") if caption_path else None
    decoders: dict = {}
    if isinstance(image_feature, library.features.Image):  # leave it encoded: the workers decode, and a bad image stays one record
        decoders = library.decode.SkipDecoding()
        for part in reversed(image_path):
            decoders = {part: decoders}
    name = f"tfds:{built.info.full_name}/{split}"

    def to_record(example: Mapping, i: int) -> Record:
        image = _walk(example, image_path)
        image = image if isinstance(image, np.ndarray) and image.dtype.kind in "ui" and image.ndim > 1 else _as_bytes(image)
        captions = _as_captions(_walk(example, caption_path), caption_feature) if caption_path else ()
        meta = {field: _plain(value) for field, value in example.items() if np.ndim(value) == 0 and not isinstance(value, Mapping)}
        meta = {field: value for field, value in meta.items() if field != image_path[0]}
        return Record(f"{split}/{i}", image, captions, meta, name)

    filters, stamps = _as_filters(filters), []
    fetch_example, total = _tfds_examples(library, built, split, decoders)
    if fetch_example is None:
        try:
            instructions = built.info.splits[split].file_instructions
        except Exception as error:
            raise ValueError(_no_split(built, split, error)) from error
        ranges: dict[str, list] = {}  # of one shard there may be several: "train[:10%]+train[90%:]"
        for item in instructions:
            ranges.setdefault(os.fspath(item.filename), []).append((item.skip, None if item.take < 0 else item.skip + item.take))
        shards = list(ranges)

        def spans(path: str) -> np.ndarray:
            found = _tfrecord_spans(path)
            return np.concatenate([found[first:last] for first, last in ranges[path]])

        def parse(data: bytes, path: str) -> Record:
            return to_record(features.deserialize_example_np(data, decoders=decoders or None), 0)

        stamps = _stat(shards)
        key = _digest(["tfds", INDEX_VERSION, stamps, sorted(ranges.items()), image_key, caption_key, dataclasses.asdict(filters)])
        index = _cached_index(key, lambda: _build_index(shards, spans, parse, filters), cache_dir)
        checksum = _digest([name, [[os.path.basename(shard), size] for shard, size, _ in stamps], _index_digest(index)])
        source = _sharded_source(name, shards, index, parse, filters, checksum)
        fetch = lambda i: dataclasses.replace(source.fetch(i), key=f"{split}/{i}")  # noqa: E731
        return dataclasses.replace(source, fetch=fetch)

    read = lambda i: to_record(fetch_example(i), i)  # noqa: E731
    kept = _filter_rows(read, total, filters)
    if not len(kept):
        raise ValueError(_nothing_left(name, total, filters))
    checksum = _digest([name, total, hashlib.sha256(kept.tobytes()).hexdigest()])
    return Source(name, checksum, total - len(kept), len(kept), lambda i: _trim_captions(read(int(kept[i])), filters))


def embeddings(path: str) -> Source:
    """What `unclip embed` made of another source (`data.embeddings`): the priors and the codec train from it, without the pictures.

    Raises `FileNotFoundError` or `ValueError` if the folder is none, is unfinished, or lacks a shard.
    """
    embedded = open_embedded(path)
    for number, described in enumerate(embedded.shards):
        folder = shard_path(embedded.path, number)
        if read_json(folder / "shard.json")["sha256"] != described["sha256"]:
            raise ValueError(f"{folder} is not the shard that {embedded.path}/manifest.json describes: copy the embeddings again")
    opened = functools.lru_cache(OPEN_EMBEDDED)(lambda number: Shard(shard_path(embedded.path, number), embedded.states))
    ends = np.cumsum([shard["images"] for shard in embedded.shards])

    def fetch(i: int) -> Record:
        number = int(np.searchsorted(ends, i, side="right"))
        shard, row = opened(number), i - int(ends[number - 1] if number else 0)
        return Record(str(i), b"", shard.captions(row), {}, str(shard.folder), shard.row(row))

    checksum = _digest([shard["sha256"] for shard in embedded.shards])
    return Source(f"embeddings:{path}", checksum, 0, int(ends[-1]), fetch, embedded)


# The whole choice of sources, by the name used in configs.
SOURCES = {
    **{"emoji": emoji, "tfrecord": tfrecord_shards, "webdataset": webdataset},
    **{"tfds": tfds, "folder": folder, "embeddings": embeddings},
}


def make_source(config: Mapping) -> Source:
    """Build a source from {"name": one of SOURCES, its arguments..., "filters": {fields of Filters}}.

    Any source also takes "balance": {"by": a field of the metadata, "power": 0 to 1} (see `balanced`).

    Raises `ValueError` naming an unknown source, argument or filter and what is allowed instead; otherwise as the source itself.
    """
    arguments = {key: config[key] for key in config}
    balance = arguments.pop("balance", None)
    name = arguments.pop("name", None)
    if name not in SOURCES:
        raise ValueError(f"unknown data source {name!r}: choose one of {', '.join(SOURCES)}")
    parameters = inspect.signature(SOURCES[name]).parameters
    for key in arguments:
        if key not in parameters:
            raise ValueError(f"unknown key {key!r} for data source {name!r}: allowed are {', '.join(parameters)}")
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and arguments.get(key) in (None, ""):
            raise ValueError(f"data source {name!r} needs {key!r}: set it in the config")
    source = SOURCES[name](**arguments)
    if balance is None:
        return source
    if set(balance) != {"by", "power"}:
        raise ValueError(f"balance needs 'by' and 'power' and nothing else, got {', '.join(map(repr, balance)) or 'nothing'}")
    return balanced(source, balance["by"], balance["power"])


def balanced(source: Source, by: str, power: float) -> Source:
    """The same records, drawn by concept: a concept of n records is drawn in proportion to n ** power.

    `by` names the field of the metadata that tells a record's concept. power 1 draws every record equally often, 0 every concept. The
    result is a source in which record i of N positions is the one whose share of [0, 1) holds (i + 1/2) / N; N is the smallest number at
    which no record is left out. So a pass over all positions shows each record in proportion to its weight, rounded to a whole number,
    and the order of training stays a pure function of (seed, step).

    The metadata of all records is read once. Records that cannot be read form a concept of their own; they are counted when drawn.

    Raises `ValueError` if a record has no such field, or for a power outside [0, 1].
    """
    if not isinstance(power, (int, float)) or not 0 <= power <= 1:
        raise ValueError(f"balance.power must be between 0 (concepts equally often) and 1 (records equally often), got {power!r}")

    def concept(i: int) -> str:
        try:
            record = source.read(i)
        except (ValueError, OSError, KeyError):
            return ""
        if by not in record.meta:
            known = ", ".join(sorted(record.meta)) or "no fields"
            raise ValueError(f"balance.by={by!r}: record {record.key} of {source.name} has no such field; it has {known}")
        return f"={record.meta[by]}"

    with ThreadPoolExecutor(8) as pool:
        _, which, sizes = np.unique(list(pool.map(concept, range(len(source)))), return_inverse=True, return_counts=True)
    weights = sizes[which].astype(np.float64) ** (power - 1)
    ends = np.cumsum(weights / weights.sum())
    length = int(np.ceil(weights.sum() / weights.min()))

    def fetch(i: int) -> Record:
        return source.fetch(min(int(np.searchsorted(ends, (i + 0.5) / length, side="right")), len(source) - 1))

    checksum = _digest([source.checksum, by, float(power)])
    return dataclasses.replace(source, checksum=checksum, length=length, fetch=fetch)


# ----------------------------------------------------------------------------------------------------------------------
# Filters
# ----------------------------------------------------------------------------------------------------------------------
def _as_filters(filters: Mapping | Filters | None) -> Filters:
    if filters is None or isinstance(filters, Filters):
        return filters or Filters()
    allowed = [field.name for field in dataclasses.fields(Filters)]
    values = {key: filters[key] for key in filters}
    for key in values:
        if key not in allowed:
            raise ValueError(f"unknown filter {key!r}: allowed are {', '.join(allowed)}")
    scores = {}
    for field in values.get("scores") or {}:
        bounds = values["scores"][field]
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
            raise ValueError(f"filter scores[{field!r}] is {bounds!r}: expected (lowest, highest), None for an open end")
        scores[field] = tuple(bounds)
    for key, value in values.items():
        if key != "scores" and value is not None and not isinstance(value, (int, float)):
            raise ValueError(f"filter {key}={value!r}: expected a number")
    values = {key: value for key, value in values.items() if value is not None}  # None is the default: nothing filtered
    return Filters(**{**values, "scores": scores})


def _keeps(filters: Filters, record: Record) -> bool:
    if filters.needs_size:
        width, height = record.meta.get("width"), record.meta.get("height")
        if not (isinstance(width, (int, float)) and isinstance(height, (int, float)) and width > 0 and height > 0):
            width, height = ops.image_size(record.image)
        if min(width, height) < filters.min_side:
            return False
        if filters.max_aspect is not None and max(width, height) > filters.max_aspect * min(width, height):
            return False
    if (filters.min_caption_chars > 0 or filters.max_caption_chars is not None) and not _trim_captions(record, filters).captions:
        return False
    for field, (lowest, highest) in filters.scores.items():
        score = record.meta.get(field)
        if not isinstance(score, (int, float)) or math.isnan(score):
            return False
        if (lowest is not None and score < lowest) or (highest is not None and score > highest):
            return False
    return True


def _trim_captions(record: Record, filters: Filters) -> Record:
    low, high = filters.min_caption_chars, filters.max_caption_chars
    if low <= 0 and high is None:
        return record
    fits = tuple(caption for caption in record.captions if low <= len(caption.strip()) and (high is None or len(caption.strip()) <= high))
    return dataclasses.replace(record, captions=fits)


def _filter_rows(read: Callable[[int], Record], total: int, filters: Filters) -> np.ndarray:
    # int64 rows that pass. A row that cannot be read stays: the pipeline counts it, replaces it and stops when there are too many.
    if not filters.active:
        return np.arange(total, dtype=np.int64)
    kept = []
    for i in range(total):
        try:
            keep = _keeps(filters, read(i))
        except (ValueError, OSError, KeyError):
            keep = True
        if keep:
            kept.append(i)
    return np.array(kept, np.int64)


def _nothing_left(what: str, total: int, filters: Filters) -> str:
    if total == 0:
        return f"{what} holds no records"
    active = {field.name: getattr(filters, field.name) for field in dataclasses.fields(Filters)}
    active = {key: value for key, value in active.items() if value != getattr(Filters(), key)}
    return f"the filters {active} keep none of the {total} records of {what}: loosen them, or check that the metadata has these fields"


# ----------------------------------------------------------------------------------------------------------------------
# Index: build, cache, read through it
# ----------------------------------------------------------------------------------------------------------------------
def _indexed(kind: str, pattern: str | Sequence[str], spans: Callable, parse: Callable, filters, cache_dir: str | None) -> Source:
    filters = _as_filters(filters)
    shards = _match(pattern)
    stamps = _stat(shards)
    key = _digest([kind, INDEX_VERSION, stamps, dataclasses.asdict(filters)])
    index = _cached_index(key, lambda: _build_index(shards, spans, parse, filters), cache_dir)
    checksum = _digest([kind, [[os.path.basename(shard), size] for shard, size, _ in stamps], _index_digest(index)])
    name = f"{kind}:{pattern if isinstance(pattern, str) else ','.join(pattern)}"
    return _sharded_source(name, shards, index, parse, filters, checksum)


def _build_index(shards: Sequence[str], spans: Callable, parse: Callable, filters: Filters) -> Index:
    # spans(path) -> int64 (N, 2) of (offset, length); parse(bytes, path) -> Record.
    read = _reader(shards)

    def one(shard: int) -> tuple[np.ndarray, int]:
        try:
            found = np.asarray(spans(shards[shard]), np.int64).reshape(-1, 2)
        except ValueError as error:
            raise ValueError(f"{one_line(error)}; write this shard again or leave it out of the pattern") from None
        kept = _filter_rows(lambda i: parse(read(shard, *found[i]), shards[shard]), len(found), filters)
        return found[kept], len(found)

    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(one, range(len(shards))))
    rows = np.concatenate([part for part, _ in parts])
    shard = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part, _ in parts])
    total = sum(count for _, count in parts)
    if not len(rows):
        raise ValueError(_nothing_left(f"{len(shards)} shard(s) from {shards[0]} on", total, filters))
    return Index(shard, rows[:, 0].copy(), rows[:, 1].copy(), total - len(rows))


def _cached_index(key: str, build: Callable[[], Index], cache_dir: str | None) -> Index:
    """`build()`, or the same from `<cache_dir>/<key>.npz` if its bytes match `<key>.sha256`; a stale or damaged one is built again."""
    directory = Path(cache_dir or cache_folder() / "index")
    file, beside = directory / f"{key}.npz", directory / f"{key}.sha256"
    try:
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() == beside.read_text().strip():
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                return Index(arrays["shard"], arrays["offset"], arrays["length"], int(arrays["n_filtered"]))
        log.warning("the cached index %s does not match its checksum: building it again", file)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError) as error:
        log.warning("cannot read the cached index %s (%s): building it again", file, one_line(error))
    index = build()
    buffer = io.BytesIO()
    np.savez(buffer, shard=index.shard, offset=index.offset, length=index.length, n_filtered=index.n_filtered)
    data = buffer.getvalue()
    try:
        write_whole(file, data)
        write_whole(beside, hashlib.sha256(data).hexdigest() + "\n")
    except OSError as error:
        log.warning("cannot cache the index in %s (%s): the next run indexes again; set UNCLIP_CACHE", directory, one_line(error))
    return index


def _sharded_source(name: str, shards: Sequence[str], index: Index, parse: Callable, filters: Filters, checksum: str) -> Source:
    read = _reader(shards)

    def fetch(i: int) -> Record:
        shard = int(index.shard[i])
        try:
            record = parse(read(shard, int(index.offset[i]), int(index.length[i])), shards[shard])
        except (ValueError, OSError, KeyError) as error:
            raise ValueError(f"{shards[shard]}, byte {index.offset[i]}: {one_line(error)}") from error
        return _trim_captions(record, filters)

    return Source(name, checksum, index.n_filtered, len(index.shard), fetch)


def _reader(shards: Sequence[str]) -> Callable[[int, int, int], bytes]:
    """read(shard, offset, length) -> bytes, from any thread. The first `OPEN_FILES` local shards touched stay open."""
    files: dict[int, io.FileIO] = {}
    lock = threading.Lock()

    def read(shard: int, offset: int, length: int) -> bytes:
        path = shards[shard]
        if is_remote(path):
            with store_errors(path), _gfile().GFile(path, "rb") as remote:
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
                with open(path, "rb", buffering=0) as once:
                    data = os.pread(once.fileno(), int(length), int(offset))
        if len(data) != length:
            raise ValueError(f"{path} ends inside the record at byte {offset}: it changed since it was indexed")
        return data

    return read


def _match(pattern: str | Sequence[str]) -> list[str]:
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    shards: list[str] = []
    for item in patterns:
        with store_errors(item):
            found = _gfile().glob(item) if is_remote(item) else glob.glob(os.path.expanduser(item), recursive=True)
        if not found:
            raise FileNotFoundError(f"no shard matches {item!r}: check the path; it is a glob such as /data/shards/*.tfrecord")
        shards.extend(found)
    return sorted(set(shards))


def _stat(paths: Sequence[str]) -> list[list]:
    """[path, bytes, modification time in ns] of each; what an index is keyed by."""

    def one(path: str) -> list:
        if is_remote(path):
            with store_errors(path):
                status = _gfile().stat(path)
            return [path, int(status.length), int(status.mtime_nsec)]
        status = os.stat(path)
        return [os.path.abspath(path), status.st_size, status.st_mtime_ns]

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, paths))


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _index_digest(index: Index) -> str:
    digest = hashlib.sha256()
    for array in (index.shard, index.offset, index.length):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Shard formats
# ----------------------------------------------------------------------------------------------------------------------
def _tfrecord_spans(path: str) -> np.ndarray:
    if not is_remote(path):
        return tfrecord.index_records(path)
    with store_errors(path), _gfile().GFile(path, "rb") as file:
        return tfrecord.index_records(file)


def _parse_tfrecord(data: bytes, path: str) -> Record:
    features = tfrecord.decode_example(data)
    encoding = next((key for key in IMAGE_KEYS if features.get(key)), None)
    if encoding is None:
        raise ValueError(f"the record has no image: expected one of the features {', '.join(IMAGE_KEYS)}, it has {sorted(features)[:12]}")
    if features.get("json"):
        meta = _parse_json(features["json"][0])
    else:
        meta = {name: _plain_feature(values) for name, values in features.items() if name not in (*IMAGE_KEYS, "txt", "key", "json")}
    text = features["txt"][0] if features.get("txt") else None
    key = features["key"][0].decode("utf-8") if features.get("key") else str(meta.get("key", ""))
    return Record(key, features[encoding][0], _captions(meta, text), meta, path)


def _plain_feature(values: list):
    values = [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values]
    return values[0] if len(values) == 1 else values


def _tar_spans(path: str) -> np.ndarray:
    # One span per record: from the header of its first member to the end of its last, so that it is a small tar by itself.
    remote = is_remote(path)
    handle = _gfile().GFile(path, "rb") if remote else open(path, "rb")
    spans: list[list[int]] = []
    with handle as file:
        size = handle.size() if remote else os.path.getsize(path)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                key = None
                for member in tar:
                    if not member.isfile():
                        continue
                    end = member.offset_data + -(-member.size // 512) * 512
                    if member.offset_data + member.size > size:
                        raise ValueError(f"{path}: truncated tar: member {member.name} runs past the end of the file")
                    if _tar_key(member.name)[0] == key:
                        spans[-1][1] = min(end, size) - spans[-1][0]
                    else:
                        spans.append([member.offset, min(end, size) - member.offset])
                        key = _tar_key(member.name)[0]
        except tarfile.TarError as error:
            raise ValueError(f"{path}: not an uncompressed tar that can be read ({one_line(error)})") from error
    return np.array(spans, np.int64).reshape(-1, 2)


def _tar_key(name: str) -> tuple[str, str]:
    # "a/b/0001.seg.png" -> ("a/b/0001", "seg.png"), as webdataset splits it.
    head, _, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    return (f"{head}/{stem}" if head else stem), field.lower()


def _parse_tar(data: bytes, path: str) -> Record:
    members: dict[str, bytes] = {}
    key = ""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    key, field = _tar_key(member.name)
                    members[field] = tar.extractfile(member).read()
    except tarfile.TarError as error:
        raise ValueError(f"damaged tar member ({one_line(error)})") from error
    encoding = next((field for field in IMAGE_KEYS if field in members), None)
    if encoding is None:
        raise ValueError(f"record {key!r} has no image: expected a member ending in {', '.join(IMAGE_KEYS)}, it has {sorted(members)}")
    meta = _parse_json(members["json"]) if "json" in members else {}
    return Record(key, members[encoding], _captions(meta, members.get("txt")), meta, path)


def _parse_json(data: bytes) -> dict:
    try:
        meta = json.loads(data)
    except ValueError as error:
        raise ValueError(f"the metadata is not JSON ({one_line(error)})") from error
    if not isinstance(meta, dict):
        raise ValueError(f"the metadata is a JSON {type(meta).__name__}, expected an object")
    return meta


def _captions(meta: Mapping, text: bytes | None) -> tuple[str, ...]:
    listed = meta.get("captions")
    if isinstance(listed, str):
        listed = [listed]
    if listed:
        return tuple(str(caption) for caption in listed)
    if text is not None:
        return (text.decode("utf-8", "replace"),)
    return (meta["caption"],) if isinstance(meta.get("caption"), str) else ()


# ----------------------------------------------------------------------------------------------------------------------
# TensorFlow and TFDS, imported when first needed
# ----------------------------------------------------------------------------------------------------------------------
def import_tensorflow(needed_by: str):
    """The tensorflow module, quiet and kept off the GPU. Raises `ImportError` with one line saying what needs it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import tensorflow as tf
    except ImportError:
        raise ImportError(f"{needed_by} needs TensorFlow: pip install tensorflow") from None
    try:
        tf.config.set_visible_devices([], "GPU")  # it would otherwise take the memory that JAX needs
    except RuntimeError:  # already initialised by the caller
        pass
    return tf


def _gfile():
    return import_tensorflow("a path with ://").io.gfile


def _import_tfds():
    import_tensorflow("the 'tfds' source")
    try:
        import tensorflow_datasets
    except ImportError:
        raise ImportError("the 'tfds' source needs TensorFlow Datasets: pip install tensorflow-datasets") from None
    return tensorflow_datasets


def _tfds_examples(library, built, split: str, decoders: dict) -> tuple[Callable | None, int]:
    # (fetch(i) -> example, count); fetch is None if the TFRecord shards are to be indexed instead.
    stored = built.info.available_file_formats() | {built.info.file_format}
    try:
        if stored & set(library.core.FileFormat.with_random_access()) and built.info.splits:
            data = built.as_data_source(split=split, decoders=decoders or None)
            lock = threading.Lock()  # its readers open their files lazily, which is not guarded

            def fetch(i: int) -> Mapping:
                with lock:
                    return data[i]

            return fetch, len(data)
        if built.info.file_format == library.core.FileFormat.TFRECORD and built.info.splits:
            return None, 0
        examples = list(library.as_numpy(built.as_dataset(split=split, decoders=decoders or None, shuffle_files=False)))
        return examples.__getitem__, len(examples)
    except Exception as error:
        raise ValueError(_no_split(built, split, error)) from error


def _no_split(built, split: str, error: Exception) -> str:
    if not built.info.splits:
        return f"TFDS {built.name!r} is not prepared in {built.data_dir}: run `tfds build {built.name}`, or set data_dir"
    return f"cannot read split {split!r} of TFDS {built.name!r} (it has {', '.join(sorted(built.info.splits))}): {one_line(error)}"


def _feature_path(key: str) -> tuple[str, ...]:
    return tuple(key.replace(".", "/").split("/"))


def _find_feature(features, path: tuple[str, ...], builder: str, argument: str):
    feature = features
    for part in path:
        feature = getattr(feature, "feature", feature)  # a Sequence of a dict is walked like the dict
        try:
            feature = feature[part]
        except (KeyError, TypeError):
            known = ", ".join(sorted(features))
            raise ValueError(f"TFDS {builder!r} has no feature {'/'.join(path)!r}: set {argument} to one of {known}") from None
    return feature


def _walk(example, path: tuple[str, ...]):
    for part in path:
        example = [item[part] for item in example] if isinstance(example, (list, tuple)) else example[part]
    return example


def _as_bytes(image) -> bytes:
    image = image.item() if isinstance(image, (np.ndarray, np.generic)) else image
    if not isinstance(image, bytes):
        raise ValueError(f"the image feature holds {type(image).__name__}, expected encoded bytes or an array")
    return image


def _as_captions(value, feature) -> tuple[str, ...]:
    names = getattr(feature, "int2str", None) or getattr(getattr(feature, "feature", None), "int2str", None)
    texts = []
    for item in np.asarray(value, object).reshape(-1).tolist():
        if isinstance(item, (int, np.integer)) and names is not None:
            item = names(int(item)).replace("_", " ")
        texts.append(item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item))
    return tuple(texts)


def _plain(value):
    value = value.item() if isinstance(value, (np.ndarray, np.generic)) else value
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
