"""The dataset that ships with the package: 64x64 emoji drawings with captions."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from unclip_jax.data import tfrecord
from unclip_jax.data.filters import Filters, as_filters
from unclip_jax.data.index import build_index, sharded_source
from unclip_jax.data.record import Source, json_checksum
from unclip_jax.data.sources.tfrecord import parse_tfrecord
from unclip_jax.errors import InputError

EMOJI_FOLDER = Path(__file__).parent.parent / "emoji"
SPLITS = ("train", "val", "compose")
ALL = "all"  # of the splits together


def emoji_source(
    split: str = "train", *, filters: Mapping | Filters | None = None, style: str | None = None
) -> Source:
    """One split of the emoji data: "train", "val" or "compose" (`data.emoji.build` says what they hold).

    The split "all" has the records of all three. It is for a network that judges samples, never for one that
    draws them or guides the drawing. A `style` ("3d", "flat", "noto", "blob") leaves the others out.

    Raises:
      ValueError: for another split or style.
      FileNotFoundError: if the package was installed without its data.
    """
    if split not in (*SPLITS, ALL):
        known = ", ".join((*SPLITS, ALL))
        raise InputError(f"unknown split {split!r} of the emoji data: choose one of {known}")
    names = SPLITS if split == ALL else (split,)
    shards = [str(path) for name in names for path in sorted(EMOJI_FOLDER.glob(f"{name}-*-of-*.tfrecord"))]
    manifest = EMOJI_FOLDER / "manifest.json"
    if not shards or not manifest.exists():
        raise FileNotFoundError(
            "the embedded emoji data is missing from unclip_jax/data/emoji: install the package again"
        )
    filters = as_filters(filters)
    index = build_index(shards, tfrecord.index_records, parse_tfrecord, filters)
    text = manifest.read_bytes()
    checksum = json.loads(text).get("checksum") or hashlib.sha256(text).hexdigest()
    if filters.active or split != "train":  # the manifest's own checksum stands for the training split
        checksum = json_checksum([checksum, split, dataclasses.asdict(filters)])
    source = sharded_source(f"emoji/{split}", shards, index, parse_tfrecord, filters, checksum)
    return source if style is None else _of_style(source, style)


def _of_style(source: Source, style: str) -> Source:
    styles = [source.read(i).meta["style"] for i in range(len(source))]
    rows = [i for i, found in enumerate(styles) if found == style]
    if not rows:
        known = ", ".join(sorted(set(styles)))
        raise InputError(f"unknown style {style!r} of the emoji data: choose one of {known}")
    return dataclasses.replace(
        source,
        name=f"{source.name}/{style}",
        checksum=json_checksum([source.checksum, style]),
        n_filtered=source.n_filtered + len(source) - len(rows),
        length=len(rows),
        fetch=lambda i: source.fetch(rows[i]),
    )
