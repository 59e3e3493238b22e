"""Sets of images to measure: a folder, a source, images or statistics in a file, samples of a bundle.

A set is named by one text:

| text                        | set                                                               |
|-----------------------------|-------------------------------------------------------------------|
| `DIR`                       | the images below a folder, maybe with captions beside them        |
| `FILE.npz`                  | statistics, or images in `arr_0` (see `statistics`)               |
| `name=tfrecord,pattern=...` | a source, with the arguments of docs/data.md                      |
| `bundle=DIR`                | what a bundle draws from captions                                 |

A folder whose name looks like the last two is written `./name=...`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from unclip_jax.checkpoint.bundle import Bundle
from unclip_jax.checkpoint.store import params_hash
from unclip_jax.data import ops
from unclip_jax.data.index import file_stamps
from unclip_jax.data.pipeline import DATA_ERRORS
from unclip_jax.data.record import Source, caption_texts, error_summary, json_checksum
from unclip_jax.data.sources import make_source
from unclip_jax.errors import InputError
from unclip_jax.evaluate.statistics import Statistics, read_statistics
from unclip_jax.paths import is_remote, store_errors, user_path
from unclip_jax.sampling.programs import Sampler, as_sampler
from unclip_jax.sampling.text_to_image import prior_of, system_of, text_to_image

ASSIGNMENT = re.compile(r"[A-Za-z_.]+=")
# The first bytes of files, and the format that they show.
MAGIC = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
)
DRAWN, ARRAY = "drawn", "array"  # what stands for a format where there was no file


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image, uint8 (H, W, 3), and the format in which it was stored."""

    pixels: np.ndarray
    stored: str


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images that are read by their numbers.

    name: what messages call the set.
    checksum: identifies the images.
    count: number of images.
    load: numbers -> the images, each a `Picture`, or the reason why it cannot be used.
    captions: numbers -> the first caption of each image; None if the set has no captions.
    ahead: whether images may be loaded by another thread while the devices work.
    """

    name: str
    checksum: str
    count: int
    load: Callable[[Sequence[int]], list[Picture | str]]
    captions: Callable[[Sequence[int]], list[str]] | None = None
    ahead: bool = True


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How a bundle draws.

    captions: what it draws, one image each. Image i is drawn at position i.
    prior, seed, options: as in `text_to_image`.
    """

    captions: Sequence[str]
    prior: str | None = None
    seed: int = 0
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A set that was opened: its statistics, its images, or both (files of ADM hold both)."""

    name: str
    statistics: Statistics | None = None
    images: ImageSet | None = None


# ------------------------------------------------------------------------------------------ by name
def bundle_of(text: str) -> str | None:
    """The bundle that the text of a set names; None if the set is no bundle.

    Raises:
      ValueError: if there are other keys beside `bundle`.
    """
    if not text.startswith("bundle="):
        return None
    first, *rest = split_assignments(text)
    if rest:
        raise InputError(
            f"{text}: a bundle takes no other key; --captions, --prior, --guidance, --steps and --set say "
            "how it draws"
        )
    return first.partition("=")[2]


def split_assignments(text: str) -> list[str]:
    """The K=V of a source: "name=folder,path=a,b" -> ["name=folder", "path=a,b"]."""
    return re.split(r",(?=[A-Za-z_.]+=)", text)


def is_source(text: str) -> bool:
    """Whether the text of a set gives the arguments of a source."""
    return bool(ASSIGNMENT.match(text)) and not text.startswith("bundle=")


def open_set(text: str, source_options: Callable[[list[str]], dict], tool: str | None = None) -> Opened:
    """Opens a set that is no bundle.

    Args:
      text: see the module's docstring.
      source_options: K=V texts -> the arguments of a source.
      tool: which tool made the statistics of a file that does not say it (`statistics.MADE_BY`).

    Raises:
      FileNotFoundError, ValueError: with a message of one line.
    """
    if is_source(text):
        return Opened(text, images=source_set(make_source(source_options(split_assignments(text))), text))
    path = user_path(text)
    with store_errors(text):
        folder, there = path.is_dir(), path.exists()
        bundle = folder and (path / "bundle.json").is_file()
    if bundle:
        raise InputError(f"{text} is a bundle: write bundle={text} to measure what it draws")
    if folder:
        source = make_source({"name": "folder", "path": text})
        return Opened(text, images=source_set(source, text, _folder_stamps(text)))
    if not there:
        raise FileNotFoundError(
            f"there is no folder or file {text!r}: give images, statistics (.npz), a source "
            "(name=...,KEY=...) or a bundle (bundle=DIR)"
        )
    file = read_statistics(text, tool)
    images = None
    if file.images is not None:
        images = array_set(file.images, text, file.checksum)
    return Opened(text, file.statistics, images)


def _folder_stamps(path: str) -> list:
    # A source's checksum does not depend on the time of change. Images that are written anew under their old
    # names may keep their sizes, so here the time counts.
    if is_remote(path):
        return []
    files = sorted(str(file) for file in user_path(path).rglob("*") if file.is_file())
    return file_stamps(files)


# ------------------------------------------------------------------------------------------ kinds
def source_set(source: Source, name: str, stamps: Any = None) -> ImageSet:
    """The images of a source.

    Raises:
      ValueError: if the source has no images.
    """
    if not source.pictures:
        raise InputError(f"{name} holds embeddings and no images: name the source that was embedded")

    def one(i: int) -> Picture | str:
        try:
            image = source.read(int(i)).image
            return Picture(ops.decode_image(image), stored_as(image))
        except DATA_ERRORS as error:
            return f"image {i} of {name}: {error_summary(error)}"

    def load(rows: Sequence[int]) -> list[Picture | str]:
        with ThreadPoolExecutor(min(32, os.cpu_count() or 1), thread_name_prefix="unclip-data") as pool:
            return list(pool.map(one, rows))

    def captions(rows: Sequence[int]) -> list[str]:
        return [first_caption(source, int(i)) for i in rows]

    return ImageSet(name, json_checksum([source.checksum, stamps]), len(source), load, captions)


def first_caption(source: Source, i: int) -> str:
    """The first caption of a record. Raises a ValueError that names a record without one."""
    record = source.read(i)
    if not record.captions:
        raise InputError(f"record {i} of {source.name} ({record.key}) has no caption")
    return record.captions[0]


def array_set(images: np.ndarray, name: str, checksum: str) -> ImageSet:
    """Images in an array, uint8 (N, H, W, 3), which may be memory-mapped."""
    return ImageSet(
        name,
        json_checksum([checksum]),
        len(images),
        lambda rows: [Picture(np.asarray(images[int(i)]), ARRAY) for i in rows],
    )


def bundle_set(bundle: Sampler | Bundle, drawing: Drawing) -> ImageSet:
    """What a bundle draws. An image depends on its caption, its position and the drawing's settings alone.

    Raises:
      ValueError, KeyError: if the bundle cannot draw so, before anything is drawn.
    """
    sampler = as_sampler(bundle)
    prior = prior_of(sampler.bundle, drawing.prior)
    chosen = sampler.options(drawing.options)
    used = system_of(sampler.bundle).made_by(sampler.bundle, prior)
    for part in drawing.options:
        if part not in used:
            raise InputError(f"{part} does not draw with the prior {prior}: leave its options out")
    captions, name = list(drawing.captions), sampler.bundle.path or "the bundle"
    # A part's configuration holds what its weights do not, such as the schedule and the embeddings' scale.
    parts = {
        n: [part.hash or params_hash(part.params), part.config] for n, part in sampler.bundle.parts.items()
    }
    options = {part: dataclasses.asdict(chosen[part]) for part in used if part in chosen}
    identity = [parts, captions, prior, int(drawing.seed), options]

    def load(rows: Sequence[int]) -> list[Picture | str]:
        drawn = text_to_image(
            sampler,
            [captions[int(i)] for i in rows],
            seed=drawing.seed,
            prior=prior,
            positions=[int(i) for i in rows],
            options=drawing.options,
        )
        return [Picture(image, DRAWN) for image in drawn]

    def of(rows: Sequence[int]) -> list[str]:
        return [captions[int(i)] for i in rows]

    return ImageSet(f"samples of {name}", json_checksum(identity), len(captions), load, of, ahead=False)


def chosen_rows(count: int, rows: int | None, seed: int) -> np.ndarray:
    """At most `rows` of `count` numbers in ascending order; None means all.

    They are chosen at random with `seed`, because sources may be sorted by what they show.
    """
    if rows is None or rows >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, rows, replace=False))


def some_of(images: ImageSet, rows: int | None, seed: int) -> ImageSet:
    """At most `rows` images of a set, chosen as `chosen_rows` does."""
    chosen = chosen_rows(images.count, rows, seed)
    if len(chosen) == images.count:
        return images
    inner = images.captions
    return dataclasses.replace(
        images,
        checksum=json_checksum([images.checksum, len(chosen), seed]),
        count=len(chosen),
        load=lambda numbers: images.load([int(chosen[i]) for i in numbers]),
        captions=None if inner is None else lambda numbers: inner([int(chosen[i]) for i in numbers]),
    )


def stored_as(image: bytes | np.ndarray) -> str:
    """The format of an encoded image, by its first bytes; "array" for pixels."""
    if isinstance(image, np.ndarray):
        return ARRAY
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    return next((name for start, name in MAGIC if image.startswith(start)), "another format")


# ------------------------------------------------------------------------------------------ captions
def read_captions(text: str, source_options: Callable[[list[str]], dict]) -> list[str]:
    """The captions in a file, one a line, or the first captions of a source's records.

    Args:
      text: a file, or the arguments of a source as for `open_set`.
      source_options: as in `open_set`.

    Raises:
      FileNotFoundError, OSError, ValueError: if there is no such file, it has no caption, or a blank line
        between captions; if a record has no caption.
    """
    if is_source(text):
        source = make_source(source_options(split_assignments(text)))
        with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
            return list(pool.map(lambda i: first_caption(source, i), range(len(source))))
    lines = read_lines(text, "captions")
    for i, line in enumerate(lines):
        if not line.strip():
            raise InputError(f"{text}: line {i + 1} is blank; every line is a caption")
    return lines


def read_lines(path: str, what: str) -> list[str]:
    """The lines of a text file in UTF-8, without a blank end. Raises one-line errors that name the file."""
    file = user_path(path)
    try:
        with store_errors(path):
            data = file.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"no file of {what} {path!r}") from None
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        (text,) = caption_texts(data) or ("",)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if not lines:
        raise InputError(f"{path} has no {what}")
    return lines
