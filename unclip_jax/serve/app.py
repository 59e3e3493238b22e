"""The application: its endpoints, its errors, the page, and what runs while it does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles

import unclip_jax
from unclip_jax.serve.endpoints import add_drawing
from unclip_jax.serve.errors import KINDS, ApiError
from unclip_jax.serve.gate import Gate, answer
from unclip_jax.serve.models import Models
from unclip_jax.serve.service import ClientGone, Service
from unclip_jax.serve.settings import Settings
from unclip_jax.serve.status import add_status
from unclip_jax.serve.telemetry import LOG, Telemetry

PAGE = Path(__file__).resolve().parent / "page"


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
    add_status(app, service)
    add_drawing(app, service)
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
