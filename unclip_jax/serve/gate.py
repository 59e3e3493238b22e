"""What every request passes before it reaches an endpoint: identity, keys, origins, sizes, times and logs."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from unclip_jax.serve.errors import ApiError
from unclip_jax.serve.settings import Settings, is_loopback
from unclip_jax.serve.telemetry import LOG, Telemetry

GUARDED = ("/v1/", "/metrics")  # what needs the key


def headers_for(settings: Settings) -> dict[str, str]:
    """The headers of every answer.

    The page loads nothing from elsewhere. Only the sites of `settings.origins` may show it in a frame.
    """
    frames = " ".join(settings.origins) or "'none'"
    policy = "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'"
    return {
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "content-security-policy": f"{policy}; form-action 'self'; frame-ancestors {frames}",
    }


class Gate:
    """ASGI middleware around the whole application.

    It gives each request an `x-request-id`, asks for the key, refuses pages of other sites, ends answers that
    nobody reads any more, and counts and logs.
    """

    def __init__(self, app: Callable, settings: Settings, telemetry: Telemetry):
        self.app, self.settings, self.telemetry = app, settings, telemetry
        self._headers, self._active = headers_for(settings), 0
        self._key = None if settings.api_key is None else _digest(settings.api_key)

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        request, started, status = f"req_{secrets.token_hex(12)}", time.perf_counter(), 0
        scope.setdefault("state", {})["request_id"] = request

        async def reply(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = {"x-request-id": request, **self._headers}
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in extra.items()),
                ]
            await asyncio.wait_for(send(message), self.settings.body_time)

        self._active += 1
        try:
            self._check(scope, headers)
            await self.app(scope, receive, reply)
        except ApiError as error:
            await answer(error)(scope, receive, reply)
        except TimeoutError:  # the reader has stopped; uvicorn closes the connection
            LOG.info("%s: the client stopped reading", request)
        finally:
            self._active -= 1
        seconds = time.perf_counter() - started
        path = getattr(scope.get("route"), "path", "other")
        self.telemetry.requests.labels(path, str(status)).inc()
        self.telemetry.seconds.labels(path).observe(seconds)
        LOG.info("%s %s %s %d %.3f s", request, scope["method"], _shown(scope["path"]), status, seconds)

    def _check(self, scope: dict, headers: dict[str, str]) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._active > self.settings.connections and scope["path"] != "/healthz":
            raise ApiError(503, "too many requests at the same time; try again", retry_after=5)
        if origin is not None and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            allowed = "*" in self.settings.origins or origin in self.settings.origins
            if not allowed and _host(origin) != host:
                raise ApiError(403, f"pages of {_shown(origin)} may not call this server; see --cors")
        if self._key is None and self.settings.is_loopback() and not self._is_own(host):
            # A page whose name was pointed at this machine would else be of the same origin.
            raise ApiError(403, f"this server answers to localhost, not to {_shown(host)}; see --public-url")
        if self._key is not None and scope["path"].startswith(GUARDED) and scope["method"] != "OPTIONS":
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(_digest(given.strip()), self._key):
                raise ApiError(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY")

    def _is_own(self, host: str) -> bool:
        # Whether a Host header names this machine, or the address that the server is known by.
        known = self.settings.public_url and _host(self.settings.public_url)
        name = host.rpartition(":")[0] if host[-1:].isdigit() and not host.endswith("]") else host
        return bool(known and host == known) or is_loopback(name.strip("[]") or host)


def answer(error: ApiError) -> Any:
    """The response of an error."""
    from starlette.responses import JSONResponse

    return JSONResponse(error.body(), error.status, headers=error.headers())


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _host(url: str) -> str:
    try:
        return urlsplit(url).netloc
    except ValueError:
        return ""


def _shown(text: str) -> str:
    return ascii(text[:100])[1:-1]
