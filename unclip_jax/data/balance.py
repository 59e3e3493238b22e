"""Balancing: the records of a source, drawn by concept."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from unclip_jax.data.record import Record, Source, class_of, json_checksum
from unclip_jax.errors import InputError


def balanced(source: Source, by: str, power: float) -> Source:
    """A source that draws a concept of n records in proportion to n ** power.

    The result has N positions and holds the same records. Each record owns a share of [0, 1) in proportion to
    its weight, and position i shows the record that owns (i + 1/2) / N. N is the smallest number at which
    every record is shown. So one pass over all positions shows each record in proportion to its weight,
    rounded to a whole number, and the order of training stays a pure function of (seed, step).

    The metadata of all records is read once. Records that cannot be read form one concept together; the
    pipeline counts them when they are drawn.

    Args:
      source: the records.
      by: the field of the metadata that names a record's concept.
      power: 1 draws every record equally often, 0 every concept.

    Raises `ValueError` if a record has no such field, or for a power outside [0, 1].
    """
    if isinstance(power, bool) or not isinstance(power, (int, float)) or not 0 <= power <= 1:
        bounds = "between 0 (concepts equally often) and 1 (records equally often)"
        raise InputError(f"balance.power must be {bounds}, got {power!r}")

    if not isinstance(by, str):
        raise InputError(f"balance.by must be the name of a field, got {by!r}")

    def concept(i: int) -> str:
        try:
            record = source.read(i)
        except (ValueError, OSError, KeyError):
            return ""
        what = f"balance.by={by!r}: record {record.key} of {source.name}"
        try:
            named = class_of(record.meta, by)
        except InputError as error:
            raise InputError(f"{what}: {error}") from None
        if not named:
            known = ", ".join(sorted(record.meta)) or "no fields"
            raise InputError(f"{what} has no such field; it has {known}")
        return f"={named}"

    with ThreadPoolExecutor(8) as pool:
        concepts = list(pool.map(concept, range(len(source))))
    _, concept_of, sizes = np.unique(concepts, return_inverse=True, return_counts=True)
    weights = sizes[concept_of].astype(np.float64) ** (power - 1)
    ends = np.cumsum(weights / weights.sum())
    length = int(np.ceil(weights.sum() / weights.min()))

    def fetch(i: int) -> Record:
        return source.fetch(
            min(int(np.searchsorted(ends, (i + 0.5) / length, side="right")), len(source) - 1)
        )

    checksum = json_checksum([source.checksum, by, float(power)])
    return dataclasses.replace(source, checksum=checksum, length=length, fetch=fetch)
