"""Filters: which records an index keeps, and which captions of a record are used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from unclip_jax.data import ops
from unclip_jax.data.record import Record
from unclip_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Filters:
    """Which records an index keeps. The default keeps every record.

    Sizes are the metadata's `width` and `height`; without these, they are read from the image's header.

    Attributes:
      min_side: the shorter side has at least this many pixels.
      max_aspect: the longer side divided by the shorter side is at most this.
      min_caption_chars, max_caption_chars: captions that are shorter or longer are not used. A record without
        any usable caption is dropped.
      scores: {field: (lowest, highest)} for numbers in the metadata; None stands for an open end. A record
        without the field is dropped.
    """

    min_side: int = 0
    max_aspect: float | None = None
    min_caption_chars: int = 0
    max_caption_chars: int | None = None
    scores: Mapping[str, tuple[float | None, float | None]] = dataclasses.field(default_factory=dict)

    @property
    def active(self) -> bool:
        """Whether any filter is set."""
        return self != Filters()

    @property
    def needs_size(self) -> bool:
        """Whether a filter compares the size of the image."""
        return self.min_side > 0 or self.max_aspect is not None


def as_filters(filters: Mapping | Filters | None) -> Filters:
    """`Filters` from the `filters` entry of a config; None, also as the value of a field, is the default.

    Raises `ValueError` naming an unknown field, a value that is not a number, or a score without two bounds.
    """
    if filters is None or isinstance(filters, Filters):
        return filters or Filters()
    if not hasattr(filters, "keys"):
        raise InputError(f"filters must be fields and their values, got {filters!r}")
    allowed = [field.name for field in dataclasses.fields(Filters)]
    values = {key: filters[key] for key in filters if filters[key] is not None}
    for key, value in values.items():
        if key not in allowed:
            raise InputError(f"unknown filter {key!r}: allowed are {', '.join(allowed)}")
        if key != "scores" and not _is_number(value):
            raise InputError(f"filter {key}={value!r}: expected a number")
    given, scores = values.get("scores", {}), {}
    if not hasattr(given, "keys"):
        raise InputError(f"filter scores={given!r}: expected fields and their bounds")
    for field in given:
        bounds = given[field]
        if (
            not isinstance(bounds, (tuple, list))
            or len(bounds) != 2
            or not all(bound is None or _is_number(bound) for bound in bounds)
        ):
            raise InputError(
                f"filter scores[{field!r}] is {bounds!r}: expected (lowest, highest), None for an open end"
            )
        scores[field] = tuple(bounds)
    return Filters(**{**values, "scores": scores})


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def trim_captions(record: Record, filters: Filters) -> Record:
    """The record with only those captions whose length passes the filters."""
    lowest, highest = filters.min_caption_chars, filters.max_caption_chars
    if lowest <= 0 and highest is None:
        return record

    def passes(caption: str) -> bool:
        length = len(caption.strip())
        return lowest <= length and (highest is None or length <= highest)

    return dataclasses.replace(record, captions=tuple(filter(passes, record.captions)))


def keeps(filters: Filters, record: Record) -> bool:
    """Whether a record passes all filters. Raises `ValueError` if its size is needed and cannot be read."""
    if filters.needs_size and not _size_passes(filters, record):
        return False
    limits_captions = filters.min_caption_chars > 0 or filters.max_caption_chars is not None
    if limits_captions and not trim_captions(record, filters).captions:
        return False
    for field, (lowest, highest) in filters.scores.items():
        score = record.meta.get(field)
        if not _is_number(score):
            return False
        if (lowest is not None and score < lowest) or (highest is not None and score > highest):
            return False
    return True


def _size_passes(filters: Filters, record: Record) -> bool:
    width, height = record.meta.get("width"), record.meta.get("height")
    if not (_is_number(width) and _is_number(height) and width > 0 and height > 0):
        width, height = ops.image_size(record.image)
    if min(width, height) < filters.min_side:
        return False
    return filters.max_aspect is None or max(width, height) <= filters.max_aspect * min(width, height)


def filter_rows(read: Callable[[int], Record], total: int, filters: Filters) -> np.ndarray:
    """The numbers of those of `total` records that pass the filters: int64 (N,), ascending.

    A record that cannot be read is kept. The pipeline later counts and replaces it.
    """
    if not filters.active:
        return np.arange(total, dtype=np.int64)
    kept = []
    for i in range(total):
        try:
            keep = keeps(filters, read(i))
        except (ValueError, OSError, KeyError):
            keep = True
        if keep:
            kept.append(i)
    return np.array(kept, np.int64)


def no_records_message(where: str, total: int, filters: Filters) -> str:
    """Why a source has no records: it was empty, or the filters dropped all of its `total` records."""
    if total == 0:
        return f"{where} holds no records"
    values = {field.name: getattr(filters, field.name) for field in dataclasses.fields(Filters)}
    active = {key: value for key, value in values.items() if value != getattr(Filters(), key)}
    return (
        f"the filters {active} keep none of the {total} records of {where}: "
        "loosen them, or check that the metadata has these fields"
    )
