"""Bodies of requests from untrusted clients: bounded in bytes, parts, pixels, time and memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import numpy as np
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from unclip_jax.data import masks, ops
from unclip_jax.errors import InputError, one_line
from unclip_jax.serve import fields
from unclip_jax.serve.errors import ApiError
from unclip_jax.serve.settings import Settings

JSON_BYTES = 2**16


async def read_json(request: Request, settings: Settings) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
      ApiError: where it is of another media type, too long, slow, or no JSON object.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of another site may send other types without asking
        raise ApiError(415, f"send the body as application/json, not as {kind[:80] or 'nothing'}")
    body = await read_body(request, JSON_BYTES, settings)
    try:
        values = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return values


def _refuse(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity are not JSON


async def read_body(request: Request, most: int, settings: Settings) -> bytes:
    """The body of a request, at most `most` bytes.

    Raises:
      ApiError: 413 where it is longer, 408 where it does not arrive in time.
    """
    too_large = ApiError(413, f"the body is longer than {most} bytes")
    length = request.headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit():
        raise ApiError(400, "content-length is not a number")
    if int(length) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_time):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {settings.body_time:g} s") from None
    except ClientDisconnect:
        raise ApiError(400, "the body ends too early") from None
    return bytes(body)


# ------------------------------------------------------------------------------------------------- forms
class _InMemory(MultiPartParser):
    spool_max_size = 2**31  # the body is bounded before, so that no upload reaches the disk


async def read_form(
    request: Request, settings: Settings, files: Mapping[str, int]
) -> tuple[dict[str, str], dict[str, list[bytes]]]:
    """The fields and the files of a form. The names of files on the client's machine are not read.

    Args:
      request: with a body of multipart/form-data.
      settings: the limits.
      files: name -> how many files it may have. `name[]` means the same.

    Returns:
      The fields' texts, and the bytes of the files by name: at least one `image`.

    Raises:
      ApiError: where it is of another media type, damaged, too long, or has too many parts.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "multipart/form-data":
        raise ApiError(415, "send the body as multipart/form-data")
    body = await read_body(request, settings.upload * sum(files.values()) + JSON_BYTES, settings)

    async def once() -> AsyncIterator[bytes]:
        yield body

    parser = _InMemory(
        request.headers,
        once(),
        max_files=settings.parts,
        max_fields=settings.parts,
        max_part_size=JSON_BYTES,
    )
    try:
        parsed = await parser.parse()
    except MultiPartException as error:
        raise ApiError(400, f"the form cannot be read: {error.message}", code="invalid_form") from None
    except Exception as error:  # the parser's own errors, and those of codecs that a header names
        raise ApiError(400, f"the form cannot be read: {one_line(error)}", code="invalid_form") from None
    text: dict[str, str] = {}
    found: dict[str, list[bytes]] = {name: [] for name in files}
    try:
        for name, value in parsed.multi_items():
            short = name.removesuffix("[]")
            if short in files:
                if isinstance(value, str):
                    raise ApiError(400, f"{short} must be a file, not a field of text", short)
                data = await value.read()
                if len(data) > settings.upload:
                    raise ApiError(413, f"{short} is larger than {settings.upload} bytes", short)
                found[short].append(data)
            elif not isinstance(value, str):
                raise ApiError(400, f"{fields.shown(name)} must be text, not a file", name[:80])
            elif name in text:
                raise ApiError(400, f"{fields.shown(name)} is given twice", name[:80])
            else:
                text[name] = value
    finally:
        await parsed.close()
    for name, most in files.items():
        if len(found[name]) > most:
            raise ApiError(400, f"at most {most} of {name}, got {len(found[name])}", name)
    if not found["image"]:
        raise ApiError(400, "image is missing: send a picture", "image", "missing_parameter")
    return text, found


# ---------------------------------------------------------------------------------------------- pictures
# How files of the formats that are decoded begin. All others, SVG and PDF among them, are never opened.
MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"BM")


def check_format(data: bytes, settings: Settings, name: str) -> None:
    """Checks the format and the size of a picture by its first bytes and its header, before it is decoded.

    Raises:
      ApiError: 400 where it is not a picture of a known format; 413 where it has too many pixels.
    """
    if not data.startswith(MAGIC) and not (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        raise ApiError(400, f"{name} must be PNG, JPEG, WebP, GIF or BMP", name, "invalid_image")
    try:
        width, height = ops.image_size(data)
    except InputError as error:
        raise ApiError(400, f"{name}: {one_line(error)}", name, "invalid_image") from None
    if width * height > settings.pixels:
        raise ApiError(413, f"{name} has {width}x{height} pixels, more than {settings.pixels}", name)


async def picture(
    data: bytes, settings: Settings, turn: asyncio.Semaphore, name: str = "image"
) -> np.ndarray:
    """Decodes a picture, uint8 (H, W, 3).

    Args:
      data: the file.
      settings: the limits.
      turn: bounds how many pictures are decoded at the same time.
      name: the field, for errors.

    Raises:
      ApiError: as `check_format`, and 400 where it is damaged.
    """
    check_format(data, settings, name)
    async with turn:
        try:
            return await asyncio.to_thread(ops.decode_image, data)
        except InputError as error:
            raise ApiError(400, f"{name}: {one_line(error)}", name, "invalid_image") from None


async def picture_and_mask(
    data: bytes, mask: bytes | None, settings: Settings, turn: asyncio.Semaphore
) -> tuple[np.ndarray, np.ndarray]:
    """A picture and which of its pixels are kept: uint8 (H, W, 3) and bool (H, W).

    What is transparent in the mask is drawn anew; without a mask, what is transparent in the picture. A mask
    without transparency is read as `data.masks` says: white is drawn anew.

    Raises:
      ApiError: as `picture`; 400 where the sizes differ, or nothing is to be drawn anew.
    """
    image, name = await picture(data, settings, turn), "image" if mask is None else "mask"
    read = masks.redrawn_by_alpha if mask is None else masks.redrawn
    if mask is not None:
        check_format(mask, settings, "mask")
    async with turn:
        try:
            redrawn = await asyncio.to_thread(read, data if mask is None else mask)
        except InputError as error:
            raise ApiError(400, f"{name}: {one_line(error)}", "mask", "invalid_mask") from None
    if redrawn.shape != image.shape[:2]:
        sizes = [f"{width}x{height}" for height, width in (redrawn.shape, image.shape[:2])]
        raise ApiError(400, f"the mask is {sizes[0]}, but the image is {sizes[1]}", "mask", "invalid_mask")
    if not ops.center_crop_square(redrawn[..., None]).any():
        raise ApiError(400, "nothing is to be drawn anew in the centred square", "mask", "invalid_mask")
    return image, ~redrawn
