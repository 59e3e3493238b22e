"""Bodies of requests from untrusted clients: bounded in bytes, parts, pixels, time and memory."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

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
