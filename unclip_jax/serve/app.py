"""The application: endpoints, the OpenAPI document, and the page."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles

import unclip_jax
from unclip_jax.serve import fields, pictures, uploads
from unclip_jax.serve.errors import KINDS, ApiError
from unclip_jax.serve.gate import Gate, answer
from unclip_jax.serve.links import Links
from unclip_jax.serve.models import Model, Models
from unclip_jax.serve.settings import Settings
from unclip_jax.serve.telemetry import LOG, Telemetry
from unclip_jax.serve.worker import Job, Task, Worker

PAGE = Path(__file__).resolve().parent / "page"
TEXT = "application/json"


class Service:
    """What the endpoints share."""

    def __init__(self, settings: Settings, models: Models, telemetry: Telemetry):
        self.settings, self.models, self.telemetry = settings, models, telemetry
        announced = [task for model in models.by_name.values() for task in model.announced()]
        self.worker = Worker(settings, telemetry, announced)
        self.links = Links(settings.link_time, settings.links)

    # ------------------------------------------------------------------------------------------- requests
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

    async def answer(
        self,
        request: Request,
        images: list[Any],
        values: Mapping[str, Any],
        settings: list[dict[str, Any]],
        extra: Mapping[str, Any],
        own: int,
    ) -> Response:
        """The published answer: the pictures as urls or in base64.

        Args:
          request: whose answer it is.
          images: uint8 (H, W, 3).
          values: the fields of the request.
          settings: how each picture was drawn, for its metadata and for the client.
          extra: what the answer says beside the pictures.
          own: the side in pixels at which they were drawn.
        """
        side = fields.read_size(values["size"])
        encode = lambda: [pictures.encode_png(i, side, s) for i, s in zip(images, settings)]
        files = await asyncio.to_thread(encode)
        data = []
        for file, how in zip(files, settings):
            if values["response_format"] == "b64_json":
                picture = {"b64_json": base64.b64encode(file).decode()}
            else:
                picture = {"url": self.url(request, file)}
            data.append({**picture, **{k: how[k] for k in ("seed", "position") if k in how}})
        self.telemetry.links.set(self.links.bytes)
        shown = side or own
        body = {"created": int(time.time()), "data": data, "size": f"{shown}x{shown}", **extra}
        headers = {"x-unclip-resized": f"{own}x{own} to {side}x{side}"} if side not in (None, own) else {}
        return JSONResponse(body, headers=headers)

    def url(self, request: Request, file: bytes) -> str:
        """Keeps a picture and returns its url."""
        base = self.settings.public_url or str(request.base_url)
        return f"{base.rstrip('/')}/images/{self.links.add(file)}.png"

    def log(self, request: Request, verb: str, values: Mapping[str, Any]) -> None:
        """Writes the fields of a request into the log, without its texts unless the settings say so."""
        shown = {name: value for name, value in values.items() if value is not None}
        if not self.settings.log_prompts:
            private = ("prompt", "negative_prompt", "user", "safety_identifier", "source", "target")
            shown = {name: value for name, value in shown.items() if name not in private}
        LOG.info("%s %s %s", request.scope["state"]["request_id"], verb, json.dumps(shown))


class ClientGone(Exception):
    """The client closed the connection."""


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def new_seed(values: Mapping[str, Any]) -> int:
    """The seed of a request, or a random one."""
    return secrets.randbelow(2**32) if values["seed"] is None else values["seed"]


def create_app(settings: Settings, models: Models) -> FastAPI:
    """The ASGI application.

    Args:
      settings: addresses and limits.
      models: the bundles, on their devices.

    Returns:
      The application. Its worker starts and stops with it (`lifespan`); `app.state.service` is the `Service`.
    """
    settings.check()
    telemetry = Telemetry()
    service = Service(settings, models, telemetry)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop, settings.drain)

    app = FastAPI(
        title="unclip serve",
        version=unclip_jax.__version__,
        description="Pictures from captions and pictures, in the published format of images APIs.",
        lifespan=lifespan,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    add_endpoints(app, service)
    if PAGE.is_dir():
        app.mount("/", StaticFiles(directory=PAGE, html=True), name="page")
    add_errors(app)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-unclip-resized", "retry-after"],
        )
    app.add_middleware(Gate, settings=settings, telemetry=telemetry)
    return app


def add_errors(app: FastAPI) -> None:
    """Makes every error answer in the published form."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return answer(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        status = error.status_code if error.status_code in KINDS else 400
        found = ApiError(status, f"{request.method} {request.url.path[:200]}: {error.detail}")
        return JSONResponse(
            found.body(), error.status_code, headers={**(error.headers or {}), **found.headers()}
        )

    @app.exception_handler(ClientGone)
    async def client_gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # nobody reads it; the log does

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        LOG.error("%s failed", request.url.path[:200], exc_info=error)
        return answer(ApiError(500, "the request failed; the server's log says why"))


def add_endpoints(app: FastAPI, service: Service) -> None:
    """Adds all endpoints."""
    settings, models, worker = service.settings, service.models, service.worker

    @app.get("/healthz", responses={503: {"description": "not ready"}})
    async def healthz() -> Response:
        """Whether pictures can be drawn: 200 when the first programs are compiled, 503 before."""
        sizes = {
            model.name: worker.compiled_sizes(model.announced()[0].key) for model in models.by_name.values()
        }
        body = {
            "status": "ready" if worker.ready else "compiling",
            "batch_sizes": sizes,
            "programs_to_compile": worker.compiling(),
        }
        return JSONResponse(body, 200 if worker.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Metrics in the format of Prometheus."""
        return Response(service.telemetry.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    started = int(time.time())

    def described(model: Model) -> dict[str, Any]:
        base = {"id": model.name, "object": "model", "created": started, "owned_by": "unclip_jax"}
        return base | model.describe()

    @app.get("/v1/models")
    async def list_models() -> Response:
        """The bundles of this server."""
        return JSONResponse(
            {"object": "list", "data": [described(model) for model in models.by_name.values()]}
        )

    @app.get("/v1/models/{name}", responses={404: {"description": "no such model"}})
    async def one_model(name: str) -> Response:
        """One bundle."""
        return JSONResponse(described(models.find(name)))

    @app.get("/images/{name}.png", responses={404: {"description": "no such picture, or no longer"}})
    async def image(name: str) -> Response:
        """A picture by its url."""
        file = service.links.get(name)
        if file is None:
            raise ApiError(404, f"no such picture: urls work for {settings.link_time / 60:g} minutes")
        return Response(file, media_type="image/png", headers={"cache-control": "private, max-age=3600"})

    body = lambda verb: {
        "requestBody": {"required": True, "content": {TEXT: {"schema": fields.schema(verb)}}}
    }

    @app.post("/v1/images/generations", openapi_extra=body("generations"), responses=ANSWERS)
    async def generations(request: Request) -> Response:
        """Pictures of a caption."""
        values = fields.check_fields("generations", await uploads.read_json(request, settings))
        service.log(request, "generations", values)
        fields.read_size(values["size"])
        model, seed = models.find(values["model"]), new_seed(values)
        prior = model.prior(values)
        options = model.options(values, prior)
        own = model.own_size(fields.read_size(values["size"]))
        task = model.generate(values["prompt"], values["n"], seed, prior, options)
        drawn = await service.draw(request, task)
        how = {
            "model": model.name,
            "prompt": values["prompt"],
            "seed": seed,
            "prior": prior,
            "options": options,
        }
        settings_ = [{**how, "position": position} for position in range(values["n"])]
        images = [sizes[own] for sizes in drawn]
        return await service.answer(
            request, images, values, settings_, {"seed": seed, "model": model.name}, model.sizes[own]
        )


ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    status: {"description": kind[1] or kind[0], "content": {TEXT: {"schema": ERROR}}}
    for status, kind in KINDS.items()
}
