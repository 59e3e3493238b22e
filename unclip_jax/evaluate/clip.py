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

from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.data import ops
from unclip_jax.data.record import Record, Source
from unclip_jax.errors import InputError
from unclip_jax.metrics.linear_probe import Probe, linear_probe
from unclip_jax.metrics.retrieval import recall_at_k
from unclip_jax.metrics.zeroshot import class_embeddings, top_k_accuracy
from unclip_jax.sampling.edits.inversion import embed_captions, embed_images
from unclip_jax.sampling.programs import Progress, Sampler, as_sampler

BATCH = 128


def label_of(record: Record, label: str) -> str:
    """The name of a record's class. Underscores in folder names become spaces.

    Raises:
      ValueError: if the record has no class.
    """
    if label == "caption":
        name = record.captions[0] if record.captions else ""
    elif label == "folder":
        name = PurePosixPath(record.key).parent.name.replace("_", " ")
    else:
        name = str(record.meta.get(label, ""))
    if not name:
        raise InputError(
            f"record {record.key} of {record.shard} has no {label}; "
            "label is caption, folder, or a field of the metadata"
        )
    return name


class _Images:
    # The images of a source's records, each decoded on access.
    def __init__(self, source: Source, rows: Sequence[int]):
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> np.ndarray:
        return ops.decode_image(self.source.read(int(self.rows[i])).image)


def _rows(source: Source, rows: int | None, seed: int) -> np.ndarray:
    # Chooses at random, because sources may be sorted by class; keeps the source's order.
    if rows is None or rows >= len(source):
        return np.arange(len(source))
    return np.sort(np.random.default_rng(seed).choice(len(source), rows, replace=False))


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
    progress: Progress | None = None,
) -> dict[str, dict[int, float]]:
    """Recall at k of all captions from images, and of images from captions (`retrieval.recall_at_k`).

    Args:
      bundle: with clip.
      source: images with captions.
      rows: largest number of records, chosen at random with `seed`. None means all.
      ks: the values of k.
      progress: called with (images done, total images).

    Raises:
      ValueError: if an image has no caption.
    """
    chosen = _rows(source, rows, seed)
    captions = [source.read(int(i)).captions for i in chosen]
    image_of_caption = np.repeat(np.arange(len(chosen)), [len(c) for c in captions])
    if len(image_of_caption) == 0:
        raise InputError(f"{source.name} has no captions to retrieve")
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
    progress: Progress | None = None,
) -> tuple[dict[int, float], int]:
    """Zero-shot accuracy at k. Each class is an ensemble of prompts (`zeroshot.class_embeddings`).

    Args:
      bundle, source, rows, seed, progress: as in `retrieval`. The classes are those of the whole source.
      templates: prompts with one {} for the class.
      label: see the module's docstring.
      ks: the values of k; those that are not below the number of classes are left out.

    Returns:
      The accuracy at each k, and the number of classes.

    Raises:
      ValueError: if a record has no label, or there is only one class.
    """
    labels, classes = _labels(source, label)
    chosen = _rows(source, rows, seed)
    sampler, known_ks = as_sampler(bundle), [k for k in ks if k < len(classes)]
    z_class = class_embeddings(
        lambda prompts: embed_captions(sampler, prompts, max_batch=BATCH), classes, templates
    )
    accuracy = top_k_accuracy(_embed(sampler, source, chosen, progress), z_class, labels[chosen], known_ks)
    return accuracy, len(classes)


def probe(
    bundle: Sampler | Bundle,
    train: Source,
    test: Source,
    *,
    label: str = "caption",
    rows: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Probe:
    """A linear probe, as in CLIP's paper: on the image tower's features before the projection.

    Args:
      train, test: sources with the same classes.
      bundle, label, rows, seed, progress: as in `zeroshot`. `rows` limits each of the two sources.

    Raises:
      ImportError: if scikit-learn is not installed.
      ValueError: if a record has no label, or a class has too few rows.
    """
    sampler, features, labels = as_sampler(bundle), [], []
    for source in (train, test):
        chosen = _rows(source, rows, seed)
        labels.append([label_of(source.read(int(i)), label) for i in chosen])
        features.append(_embed(sampler, source, chosen, progress, projected=False))
    return linear_probe(features[0], np.asarray(labels[0]), features[1], np.asarray(labels[1]), seed=seed)


def _labels(source: Source, label: str) -> tuple[np.ndarray, list[str]]:
    names = [label_of(source.read(i), label) for i in range(len(source))]
    classes = sorted(set(names))
    if len(classes) < 2:
        raise InputError(
            f"{source.name} has {len(classes)} class by {label}; zero-shot classification needs two"
        )
    number = {name: i for i, name in enumerate(classes)}
    return np.asarray([number[name] for name in names]), classes
