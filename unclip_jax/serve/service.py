"""What the endpoints share: the worker, the pictures by url, and the two forms of an answer."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from unclip_jax.serve import fields, pictures
from unclip_jax.serve.links import Links
from unclip_jax.serve.models import Model, Models
from unclip_jax.serve.settings import Settings
from unclip_jax.serve.telemetry import LOG, Telemetry
from unclip_jax.serve.worker import Job, Task, Worker, as_api_error

PRIVATE = ("prompt", "negative_prompt", "user", "safety_identifier", "source", "target")


class ClientGone(Exception):
    """The client closed the connection."""


@dataclass
class Plan:
    """A task whose results are the pictures of an answer.

    model: that draws them. task: its results are pictures, or a list of pictures by size.
    how: how each picture is drawn, for its metadata. kind: of streamed events (`image_generation`).
    extra: what the answer says beside the pictures.
    """

    model: Model
    task: Task
    how: list[dict[str, Any]]
    kind: str
    extra: dict[str, Any] = field(default_factory=dict)


class Service:
    """What the endpoints share."""

    def __init__(self, settings: Settings, models: Models, telemetry: Telemetry):
        self.settings, self.models, self.telemetry = settings, models, telemetry
        tasks = [model.announced() for model in models.by_name.values()]
        # Captions come first, and the rest when all of their programs are there.
        groups = (("generations", "stream"), ("edits", "variations"))
        announced = [
            [
                task
                for by_verb in tasks
                for verb in group
                if verb in settings.compile
                for task in by_verb.get(verb, ())
            ]
            for group in groups
        ]
        self.worker = Worker(settings, telemetry, announced)
        self.links = Links(settings.link_time, settings.links)
        self.decoding = asyncio.Semaphore(2)  # pictures that are decoded at the same time

    # ------------------------------------------------------------------------------------------- drawing
    async def draw(self, request: Request, task: Task) -> list[Any]:
        """Draws a task. It is dropped when the client goes away."""
        job = self.worker.submit(task)
        done, gone = asyncio.wrap_future(job.future), asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((done, gone), return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise ClientGone
            return done.result()
        finally:
            gone.cancel()
            self._drop(job)

    def _drop(self, job: Job) -> None:
        if not job.future.done():
            self.worker.cancel(job)

    async def respond(self, request: Request, plan: Plan, values: Mapping[str, Any]) -> Response:
        """Draws a plan, and answers with its pictures at once or as they come about (`stream`)."""
        side, model = fields.read_size(values["size"]), plan.model
        place = model.own_size(side)
        own = model.sizes[place]
        headers = {"x-unclip-resized": f"{own}x{own} to {side}x{side}"} if side not in (None, own) else {}
        if values.get("stream"):
            events = self._events(request, plan, values["partial_images"], side, place)
            first = await anext(events)  # a full queue is an error of the request, not of the stream
            return StreamingResponse(_chain(first, events), media_type="text/event-stream", headers=headers)
        drawn = await self.draw(request, plan.task)
        files = await asyncio.to_thread(self._encode, drawn, plan, side, place)
        data = []
        for file, how in zip(files, plan.how):
            if values["response_format"] == "b64_json":
                picture = {"b64_json": base64.b64encode(file).decode()}
            else:
                picture = {"url": self.url(request, file)}
            data.append({**picture, **_public(how)})
        self.telemetry.links.set(self.links.bytes)
        shown = side or own
        body = {"created": int(time.time()), "data": data, "model": model.name, "size": f"{shown}x{shown}"}
        return JSONResponse(body | plan.extra, headers=headers)

    def _encode(self, drawn: list[Any], plan: Plan, side: int | None, place: int) -> list[bytes]:
        own = plan.model.sizes[place]
        return [
            pictures.encode_png(sizes[place] if isinstance(sizes, list) else sizes, side or own, how)
            for sizes, how in zip(drawn, plan.how)
        ]

    async def _events(
        self, request: Request, plan: Plan, count: int, side: int | None, place: int
    ) -> AsyncIterator[bytes]:
        # The events of a stream: `count` times pictures on the way, then all of them. The first item is
        # empty.
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        put = lambda item: loop.call_soon_threadsafe(queue.put_nowait, item)
        job = self.worker.submit(self._streamed(plan.task, count), lambda i, image: put((i, image)))
        job.future.add_done_callback(lambda future: put(None))
        gone = asyncio.ensure_future(_gone(request))
        gone.add_done_callback(lambda task: self._drop(job))
        own = plan.model.sizes[place]
        shown = side or own
        shared = {
            "size": f"{shown}x{shown}",
            "quality": "auto",
            "background": "opaque",
            "output_format": "png",
            "model": plan.model.name,
            **{name: value for name, value in plan.extra.items() if name == "seed"},
        }
        counts = [0] * len(plan.how)
        try:
            yield b""
            while (item := await queue.get()) is not None:
                i, image = item
                file = await asyncio.to_thread(pictures.encode_png, image, shown, plan.how[i])
                said = {
                    "b64_json": base64.b64encode(file).decode(),
                    "partial_image_index": counts[i],
                    "index": i,
                    "created_at": int(time.time()),
                }
                counts[i] += 1
                yield _event(f"{plan.kind}.partial_image", said | shared)
            if job.future.cancelled():  # the client has gone
                return
            try:
                drawn = job.future.result()
            except Exception as error:
                yield _event("error", as_api_error(error).body())
                return
            for i, file in enumerate(await asyncio.to_thread(self._encode, drawn, plan, side, place)):
                said = {
                    "b64_json": base64.b64encode(file).decode(),
                    "index": i,
                    "created_at": int(time.time()),
                    "usage": NO_USAGE,
                }
                yield _event(f"{plan.kind}.completed", said | shared | _public(plan.how[i]))
        finally:
            gone.cancel()
            self._drop(job)

    def _streamed(self, task: Task, count: int) -> Task:
        # The task that shows its pictures `count` times on the way. Where its programs are not compiled and
        # those of the plain task are, the plain task draws at once, and the programs are there next time.
        if not count or task.shows is None:
            return task
        stream, ready = task.shows(count), self.worker.compiled_sizes
        if ready(task.key) and not ready(stream.key):
            self.worker.prepare(stream)
            return task
        return stream

    def url(self, request: Request, file: bytes) -> str:
        """Keeps a picture and returns its url."""
        base = self.settings.public_url or str(request.base_url)
        return f"{base.rstrip('/')}/images/{self.links.add(file)}.png"

    def log(self, request: Request, verb: str, values: Mapping[str, Any]) -> None:
        """Writes the fields of a request into the log, without its texts unless the settings say so."""
        shown = {name: value for name, value in values.items() if value is not None}
        if not self.settings.log_prompts:
            shown = {name: value for name, value in shown.items() if name not in PRIVATE}
        LOG.info("%s %s %s", request.scope["state"]["request_id"], verb, json.dumps(shown))


NO_USAGE = {
    "total_tokens": 0,
    "input_tokens": 0,
    "output_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}


def new_seed(values: Mapping[str, Any]) -> int:
    """The seed of a request, or a random one."""
    return secrets.randbelow(2**32) if values["seed"] is None else values["seed"]


def _public(how: Mapping[str, Any]) -> dict[str, Any]:
    return {name: how[name] for name in ("seed", "position", "theta", "dims") if name in how}


def _event(kind: str, said: Mapping[str, Any]) -> bytes:
    data = {"type": kind, **said} if kind != "error" else said
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(rest):
        yield first
        async for item in rest:
            yield item


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
