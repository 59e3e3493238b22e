"""Labelled grids of images, as PNG."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unclip_jax.errors import InputError
from unclip_jax.paths import user_path, write_whole


def draw_grid(
    images: np.ndarray,
    captions: Sequence[str],
    *,
    columns: int | None = None,
    cell: int = 160,
) -> Image.Image:
    """Draws images with a caption under each.

    Args:
      images: uint8 (N, H, W, 3).
      captions: N labels; long ones are wrapped to three lines.
      columns: images per row; about the square root of N when None.
      cell: side of each drawn image in pixels; small images are enlarged by whole factors where possible.

    Returns:
      The picture.

    Raises:
      ValueError: when there are no images, or when images and captions differ in number.
    """
    images = np.asarray(images)
    if len(images) == 0 or len(images) != len(captions):
        raise InputError(
            f"a grid needs as many captions as images and at least one, got {len(images)} and {len(captions)}"
        )
    columns = columns or max(1, int(np.ceil(np.sqrt(len(images)))))
    rows = -(-len(images) // columns)
    font = ImageFont.load_default(size=12)
    pad, text_height = 8, 46
    width, height = pad + columns * (cell + pad), pad + rows * (cell + text_height)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = pad + (i % columns) * (cell + pad), pad + (i // columns) * (cell + text_height)
        method = Image.Resampling.NEAREST if cell % image.shape[0] == 0 else Image.Resampling.BICUBIC
        canvas.paste(Image.fromarray(image).resize((cell, cell), method), (x, y))
        lines = textwrap.wrap(caption, max(8, cell // 7)) or [""]
        if len(lines) > 3:
            lines = [*lines[:2], lines[2][: max(5, cell // 7 - 3)] + "..."]
        draw.multiline_text((x, y + cell + 2), "\n".join(lines), fill="black", font=font, spacing=1)
    return canvas


def save_grid(path: str | os.PathLike, images: np.ndarray, captions: Sequence[str], **options) -> Any:
    """Writes `draw_grid(images, captions, **options)` to `path` as PNG and creates the folder.

    The file appears complete or not at all.
    """
    return _save(path, draw_grid(images, captions, **options))


def save_picture(path: str | os.PathLike, image: np.ndarray) -> Any:
    """Writes a picture, uint8 (H, W, 3), to `path` as PNG, complete or not at all."""
    return _save(path, Image.fromarray(image))


def _save(path: str | os.PathLike, picture: Image.Image) -> Any:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    write_whole(path, file.getvalue())
    return user_path(path)
