"""A folder of images, each with a text file of the same name beside it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
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
from unclip_jax.data.record import Record, Source, json_checksum
from unclip_jax.paths import is_remote, store_errors, user_path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


def folder_source(
    path: str, *, filters: Mapping | Filters | None = None, cache_dir: str | None = None
) -> Source:
    """The images below a folder, at any depth, each with a text beside it: fox.png and fox.txt.

    Every line of the text is a caption. An image without a text has no captions. The index is cached only if
    there are filters.

    Raises `FileNotFoundError` if there is no such folder or no image in it.
    """
    root = user_path(path)
    images, texts = _list_images(path, root)

    def parse(data: bytes, image_path: str) -> Record:
        text = user_path(image_path).with_suffix(".txt")
        with store_errors(text):
            lines = text.read_text("utf-8").splitlines() if text.exists() else []
        captions = tuple(line.strip() for line in lines if line.strip())
        return Record(os.path.relpath(image_path, root), data, captions, {}, str(root))

    filters = as_filters(filters)
    stamps = file_stamps(images + texts)

    def build():
        return build_index(images, _whole_file, parse, filters)

    key = json_checksum(["folder", INDEX_VERSION, stamps, dataclasses.asdict(filters)])
    index = cached_index(key, build, cache_dir) if filters.active else build()
    sizes = [[os.path.relpath(name, root), size] for name, size, _ in stamps]
    checksum = json_checksum([sizes, index_checksum(index)])
    return sharded_source(f"folder:{path}", images, index, parse, filters, checksum)


def _list_images(path: str, root: Any) -> tuple[list[str], list[str]]:
    # The paths of all images, in a fixed order, and of those texts beside them that exist.
    with store_errors(path):
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {str(path)!r}: check the path of the folder source")
        walk = sorted(root.walk()) if is_remote(path) else os.walk(root)
    images, texts = [], []
    for current, folders, files in walk:
        folders.sort()
        names = set(files)
        for file in sorted(files):
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in IMAGE_SUFFIXES:
                images.append(os.path.join(current, file))
                texts.extend([os.path.join(current, stem + ".txt")] if stem + ".txt" in names else [])
    if not images:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        raise FileNotFoundError(f"no image in folder {str(path)!r}: expected files ending in {suffixes}")
    return images, texts


def _whole_file(path: str) -> np.ndarray:
    # An image file is a shard of one record.
    return np.array([[0, file_stamps([path])[0][1]]], np.int64)
