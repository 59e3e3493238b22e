"""Evaluates CLIP by retrieval, zero-shot classification and a linear probe.

These are the tasks of Radford et al. 2021 (sections 3.1 and 3.2); see also unCLIP appendix C.

Any source of `unclip_jax.data` works. For tasks with classes, `label` says where a record's class comes from:

| `label`        | class                                                      |
|----------------|------------------------------------------------------------|
| `caption`      | the record's first caption (for TFDS, this is the label)   |
| `folder`       | the name of the record's folder                            |
| any other name | the field of that name in the record's metadata            |
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.data.pipeline import DATA_ERRORS
from unclip_jax.data.record import Record, Source, error_summary, label_of
from unclip_jax.errors import InputError
from unclip_jax.evaluate.sets import chosen_rows
from unclip_jax.metrics.linear_probe import Probe, check_classes, check_installed, linear_probe
from unclip_jax.metrics.retrieval import recall_at_k
from unclip_jax.metrics.zeroshot import class_embeddings, top_k_accuracy
from unclip_jax.sampling.edits.inversion import embed_captions, embed_images
from unclip_jax.sampling.programs import Progress, Sampler, as_sampler

log = logging.getLogger(__name__)

BATCH = 128


class _Images:
    # The images of a source's records, each decoded on access.
    def __init__(self, source: Source, rows: Sequence[int]):
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> np.ndarray:
        return ops.decode_image(self.source.read(int(self.rows[i])).image)


def usable_rows(
    source: Source, rows: np.ndarray, read: Callable[[Record], Any], skip_bad: bool, decode: bool = True
) -> tuple[np.ndarray, list]:
    """Those of `rows` that `read` takes and whose image can be decoded, and what `read` returns for them.

    All are tried before any is embedded.

    Raises:
      ValueError: if a record cannot be used, unless `skip_bad`; or if none can.
    """
    if not source.pictures:
        raise InputError(f"{source.name} holds embeddings and no images: name the source that was embedded")

    def tried(i: int) -> Any:
        try:
            record = source.read(int(i))
            value = read(record)
            if decode:
                ops.decode_image(record.image)
            return value, None
        except DATA_ERRORS as error:
            return None, f"record {i}: {error_summary(error)}"

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        results = list(pool.map(tried, rows))
    bad = [reason for _, reason in results if reason is not None]
    if bad:
        count = f"{len(bad)} of {len(rows)} records of {source.name} cannot be used"
        if not skip_bad or len(bad) == len(rows):
            advice = "" if skip_bad else "; mend them, or leave them out with --skip-bad"
            raise InputError(f"{count}; the first is {bad[0]}{advice}")
        log.warning("%s and are left out; the first is %s", count, bad[0])
    kept = [i for i, (_, reason) in enumerate(results) if reason is None]
    return rows[kept], [results[i][0] for i in kept]


def captions_of(record: Record) -> tuple[str, ...]:
    """A record's captions. Raises a ValueError if it has none."""
    if not record.captions:
        raise InputError(f"{record.key} has no caption")
    return record.captions


def _embed(
    sampler: Sampler, source: Source, rows: np.ndarray, progress: Progress | None, projected: bool = True
) -> np.ndarray:
    return embed_images(
        sampler, _Images(source, rows), projected=projected, max_batch=BATCH, progress=progress
    )


def retrieval(
    bundle: Sampler | Bundle,
    source: Source,
    *,
    rows: int | None = None,
    ks: Sequence[int] = (1, 5, 10),
    seed: int = 0,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> dict[str, dict[int, float]]:
    """Recall at k of all captions from images, and of images from captions (`retrieval.recall_at_k`).

    Args:
      bundle: with clip.
      source: images with captions.
      rows: largest number of records, chosen at random with `seed`. None means all.
      ks: the values of k.
      skip_bad: whether records without a caption, or with a damaged image, are left out instead of refused.
      progress: called with (images done, total images).

    Raises:
      ValueError: before anything is embedded, if a record cannot be used, or there is only one.
    """
    chosen, captions = usable_rows(source, chosen_rows(len(source), rows, seed), captions_of, skip_bad)
    if len(chosen) < 2:
        raise InputError(f"{source.name} has 1 record to rank; retrieval needs two")
    image_of_caption = np.repeat(np.arange(len(chosen)), [len(c) for c in captions])
    sampler = as_sampler(bundle)
    z_text = embed_captions(sampler, [caption for group in captions for caption in group], max_batch=BATCH)
    return recall_at_k(_embed(sampler, source, chosen, progress), z_text, image_of_caption, ks)


def zeroshot(
    bundle: Sampler | Bundle,
    source: Source,
    templates: Sequence[str],
    *,
    label: str = "caption",
    rows: int | None = None,
    ks: Sequence[int] = (1, 5),
    seed: int = 0,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> tuple[dict[int, float], int]:
    """Zero-shot accuracy at k. Each class is an ensemble of prompts (`zeroshot.class_embeddings`).

    Args:
      bundle, source, rows, seed, progress: as in `retrieval`. The classes are those of the whole source.
      skip_bad: whether records without a label, or with a damaged image, are left out instead of refused.
      templates: prompts with one {} for the class.
      label: see the module's docstring.
      ks: the values of k; those that are not below the number of classes are left out.

    Returns:
      The accuracy at each k, and the number of classes.

    Raises:
      ValueError: if a record has no label, or there is only one class.
    """
    known, classes = _labels(source, label, skip_bad)
    chosen, names = usable_rows(
        source, chosen_rows(len(source), rows, seed), lambda record: label_of(record, label), skip_bad
    )
    labels = np.asarray([known[name] for name in names])
    sampler, known_ks = as_sampler(bundle), [k for k in ks if k < len(classes)]
    z_class = class_embeddings(
        lambda prompts: embed_captions(sampler, prompts, max_batch=BATCH), classes, templates
    )
    accuracy = top_k_accuracy(_embed(sampler, source, chosen, progress), z_class, labels, known_ks)
    return accuracy, len(classes)


def probe(
    bundle: Sampler | Bundle,
    train: Source,
    test: Source,
    *,
    label: str = "caption",
    rows: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Probe:
    """A linear probe, as in CLIP's paper: on the image tower's features before the projection.

    Args:
      train, test: sources with the same classes.
      bundle, label, rows, seed, skip_bad, progress: as in `zeroshot`. `rows` limits each of the two sources.

    Raises:
      ImportError: if scikit-learn is not installed.
      ValueError: before anything is embedded, if both sources hold the same data, a record has no label, a
        class has too few training rows, or one of the test rows' classes has none.
    """
    check_installed()
    if train.checksum == test.checksum:
        raise InputError(
            f"{train.name} and {test.name} hold the same data: a probe must not train on the records that it "
            "is tested on"
        )
    (train_rows, train_labels), (test_rows, test_labels) = (
        usable_rows(
            source, chosen_rows(len(source), rows, seed), lambda record: label_of(record, label), skip_bad
        )
        for source in (train, test)
    )
    check_classes(train_labels, test_labels)
    sampler = as_sampler(bundle)
    features = [
        _embed(sampler, source, chosen, progress, projected=False)
        for source, chosen in ((train, train_rows), (test, test_rows))
    ]
    return linear_probe(
        features[0], np.asarray(train_labels), features[1], np.asarray(test_labels), seed=seed
    )


def _labels(source: Source, label: str, skip_bad: bool) -> tuple[dict[str, int], list[str]]:
    every = np.arange(len(source))
    _, names = usable_rows(source, every, lambda record: label_of(record, label), skip_bad, decode=False)
    classes = sorted(set(names))
    if len(classes) < 2:
        raise InputError(
            f"{source.name} has {len(classes)} class by {label}; zero-shot classification needs two"
        )
    return {name: i for i, name in enumerate(classes)}, classes
