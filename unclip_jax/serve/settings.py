"""How a server runs: addresses, limits and what is announced. Every limit has a reason beside it."""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import re

from unclip_jax.errors import InputError

MIB = 2**20
VERBS = ("generations", "stream", "edits", "variations")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a server.

    host, port: where it listens. Other addresses than loopback need `api_key` or `no_auth`.
    api_key: what clients send as a bearer token; None asks for none.
    no_auth: allows other addresses without a key.
    batch: largest number of pictures that each device draws at a time; None chooses by the device.
    compile: what is compiled at start, of VERBS: the verbs whose first request should not wait.
    queue: pictures that may wait; more are refused with status 429.
    wait: seconds that a request waits for others to join its batch.
    deadline: seconds after which a request that is not done is given up with status 503.
    upload: bytes of one uploaded picture.
    pixels: pixels of one uploaded picture, read from its header before it is decoded.
    parts: fields and files of one multipart request.
    body_time: seconds that the body of a request may take to arrive, and a part of an answer to leave.
    connections: connections that are open at the same time.
    link_time: seconds that the url of a picture works. links: bytes of all such pictures in memory.
    origins: other web sites whose pages may call the server and show its page in a frame ("*" for all); none
      by default.
    log_prompts: writes prompts into the log.
    public_url: what urls of pictures start with; None takes the address that the client called.
    drain: seconds that requests in progress get when the server is told to stop.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    no_auth: bool = False
    batch: int | None = None
    compile: tuple[str, ...] = VERBS
    queue: int = 256
    wait: float = 0.005
    deadline: float = 300.0
    upload: int = 4 * MIB
    pixels: int = 2**24
    parts: int = 64
    body_time: float = 30.0
    connections: int = 256
    link_time: float = 3600.0
    links: int = 256 * MIB
    origins: tuple[str, ...] = ()
    log_prompts: bool = False
    public_url: str | None = None
    drain: float = 30.0

    def check(self) -> None:
        """Raises a ValueError where a setting is out of range, or would open the server by accident."""
        if not self.is_loopback() and self.api_key is None and not self.no_auth:
            raise InputError(
                f"--host {self.host} lets other machines in: set a key with --api-key or UNCLIP_API_KEY, "
                "or say --no-auth"
            )
        if self.api_key is not None and (len(self.api_key) < 8 or not self.api_key.isascii()):
            raise InputError("the API key must have at least 8 characters, all of them ASCII")
        if self.api_key is not None and self.no_auth:
            raise InputError("--no-auth and an API key exclude each other: give one of them")
        least = {
            "batch": 1,
            "queue": 1,
            "upload": 1024,
            "pixels": 1,
            "parts": 1,
            "connections": 1,
            "links": 0,
        }
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise InputError(f"{name} must be at least {value}, got {given}")
        for verb in self.compile:
            if verb not in VERBS:
                raise InputError(f"unknown verb {verb!r} to compile; choose among {', '.join(VERBS)}")
        for name in ("deadline", "body_time", "link_time", "drain"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a positive number of seconds, got {getattr(self, name)}")
        if not 0 <= self.wait <= 10:
            raise InputError(f"wait must be between 0 and 10 seconds, got {self.wait}")
        for origin in self.origins:
            if not re.fullmatch(r"\*|https?://[A-Za-z0-9.:\[\]-]+", origin):
                raise InputError(f"--cors takes an origin such as https://example.org, or *; got {origin!r}")
        if not 0 <= self.port <= 65535:
            raise InputError(f"--port must be between 0 and 65535, got {self.port}")

    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
