"""Endpoints that draw nothing: health, metrics, models, and pictures by their urls."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from unclip_jax.serve.errors import ApiError
from unclip_jax.serve.models import Model
from unclip_jax.serve.service import Service


def add_status(app: FastAPI, service: Service) -> None:
    """Adds the endpoints that draw nothing."""
    settings, models, worker = service.settings, service.models, service.worker

    @app.get("/healthz", responses={503: {"description": "not ready"}})
    async def healthz() -> Response:
        """Whether pictures can be drawn: 200 when the first programs are compiled, 503 before."""
        sizes = {model.name: worker.compiled_sizes(model.first().key) for model in models.by_name.values()}
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
