"""A folder of images, each with a text file of the same name beside it."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from unclip_jax.data.filters import Filters, as_filters
from unclip_jax.data.index import (
    INDEX_VERSION,
    build_index,
    cached_index,
    file_stamps,
    index_checksum,
    sharded_source,
)
from unclip_jax.data.record import Record, Source, caption_texts, json_checksum
from unclip_jax.errors import InputError
from unclip_jax.paths import is_hidden, is_remote, store_errors, user_path

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


@dataclasses.dataclass(frozen=True)
class _Listed:
    """What a folder holds.

    Attributes:
      images: the paths of all images, in a fixed order.
      texts: path of an image -> paths of the texts beside it that may be its own.
      shared: path of an image -> why its text may be another image's.
      passed_over: what was left out, in words -> how many there were.
    """

    images: list[str]
    texts: dict[str, list[str]]
    shared: dict[str, str]
    passed_over: collections.Counter[str]


def folder_source(
    path: str, *, filters: Mapping | Filters | None = None, cache_dir: str | None = None
) -> Source:
    """The images below a folder, at any depth, each with a text beside it: fox.png and fox.txt.

    The text may also be fox.TXT or fox.png.txt. Every line of it is a caption. An image without a text has no
    captions. Linked folders are followed, and every folder is read once. Hidden and system files are skipped;
    other files that are left out are counted in one warning. The index is cached only if there are filters.

    A record is bad if it is a link that leads nowhere, if there are several texts for one image, or if images
    such as fox.png and fox.jpg share the text fox.txt.

    Raises `FileNotFoundError` if there is no such folder or no image in it.
    """
    filters = as_filters(filters)
    root = user_path(path)
    listed = _list_folder(path, root)
    images = listed.images

    def parse(data: bytes, image_path: str) -> Record:
        key = os.path.relpath(image_path, root)
        if not data and _is_dead_link(image_path):
            raise InputError(f"{key} is a link that leads nowhere")
        texts = listed.texts.get(image_path, [])
        if image_path in listed.shared:
            raise InputError(listed.shared[image_path])
        if len(texts) > 1:
            names = " and ".join(os.path.basename(text) for text in texts)
            raise InputError(f"{key} has several texts, {names}: keep one")
        lines = [line for text in texts for line in re.split(r"\r\n|\r|\n", _read_text(text))]
        captions = tuple(line.strip() for line in lines)
        return Record(key, data, caption_texts(captions), {}, str(root))

    texts = sorted({text for texts in listed.texts.values() for text in texts})
    stamps = file_stamps([*images, *texts])

    def build():
        return build_index(images, _whole_file, parse, filters)

    key = json_checksum(["folder", INDEX_VERSION, stamps, dataclasses.asdict(filters)])
    index = cached_index(key, build, cache_dir) if filters.active else build()
    sizes = [[os.path.relpath(name, root), size] for name, size, _ in stamps]
    checksum = json_checksum([sizes, _hashes(texts), index_checksum(index)])
    if listed.passed_over:
        counted = ", ".join(f"{count} {what}" for what, count in sorted(listed.passed_over.items()))
        log.warning("folder %s has %d images; passed over: %s", path, len(images), counted)
    return sharded_source(f"folder:{path}", images, index, parse, filters, checksum)


def _read_text(path: str) -> str:
    if _is_dead_link(path):
        raise InputError(f"the text {os.path.basename(path)} is a link that leads nowhere")
    with store_errors(path):
        return "".join(caption_texts(user_path(path).read_bytes()))


def _hashes(texts: list[str]) -> list[str]:
    # A caption may change and keep its length, so the sizes of texts do not identify them.
    def digest(path: str) -> str:
        with store_errors(path):
            return hashlib.sha256(b"" if _is_dead_link(path) else user_path(path).read_bytes()).hexdigest()

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(digest, texts))


def _is_dead_link(path: str) -> bool:
    return not is_remote(path) and os.path.islink(path) and not os.path.exists(path)


# ------------------------------------------------------------------------------------------------------------
# Listing
# ------------------------------------------------------------------------------------------------------------
def _list_folder(path: str, root: Any) -> _Listed:
    with store_errors(path):
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {str(path)!r}: check the path of the folder source")
        passed_over: collections.Counter[str] = collections.Counter()
        walk = root.walk() if is_remote(path) else _walk(str(root), passed_over)
        folders = {
            os.fspath(folder): names
            for folder, _, names in walk
            if not is_hidden(os.path.relpath(folder, root))
        }
    images, owned, shared = [], {}, {}
    for folder in sorted(folders, key=lambda folder: os.path.relpath(folder, root).split(os.sep)):
        names = sorted(name for name in folders[folder] if not is_hidden(name))
        pictures = [name for name in names if _suffix(name) in IMAGE_SUFFIXES]
        images += [os.path.join(folder, name) for name in pictures]
        texts = collections.defaultdict(list)  # what stands before .txt -> the texts of that name
        for name in names:
            if _suffix(name) == ".txt":
                texts[os.path.splitext(name)[0]].append(name)
            elif _suffix(name) not in IMAGE_SUFFIXES:
                passed_over[f"{_suffix(name) or 'files without a suffix'}"] += 1
        by_stem = collections.defaultdict(list)
        for name in pictures:
            by_stem[os.path.splitext(name)[0]].append(name)
        for stem, of_stem in by_stem.items():
            for name in of_stem:
                own = texts.get(name, [])
                named = own + (texts.get(stem, []) if len(of_stem) == 1 or not own else [])
                owned[os.path.join(folder, name)] = [os.path.join(folder, text) for text in named]
                if len(of_stem) > 1 and not own and stem in texts:
                    reason = f"may describe any of {', '.join(of_stem)}: name it {of_stem[0]}.txt or the like"
                    shared[os.path.join(folder, name)] = f"the text {texts[stem][0]} {reason}"
        used = {os.path.basename(text) for name in pictures for text in owned[os.path.join(folder, name)]}
        unused = sum(name not in used for names in texts.values() for name in names)
        passed_over.update({"texts without an image": unused} if unused else {})
    if not images:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        raise FileNotFoundError(f"no image in folder {str(path)!r}: expected files ending in {suffixes}")
    return _Listed(images, owned, shared, passed_over)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _walk(root: str, passed_over: collections.Counter[str]) -> Iterator[tuple[str, None, list[str]]]:
    # Like os.walk, but it follows links to folders, reads every folder once (so that links cannot lead in a
    # circle), and raises an OSError for a folder that cannot be read. Real folders come before linked ones.
    real, linked, seen = collections.deque([root]), collections.deque(), set()
    while real or linked:
        folder = (real or linked).popleft()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            passed_over["links to a folder that is there already"] += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        names = []
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if is_hidden(entry.name):
                    continue
                if entry.is_symlink() and _is_dead_link(entry.path):
                    names.append(entry.name)
                elif entry.is_dir():
                    (linked if entry.is_symlink() else real).append(entry.path)
                elif entry.is_file():
                    names.append(entry.name)
                else:
                    passed_over["that are no files"] += 1
        yield folder, None, names


def _whole_file(path: str) -> np.ndarray:
    # An image file is a shard of one record.
    return np.array([[0, file_stamps([path])[0][1]]], np.int64)
