"""The application: parts in, ASGI app out."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus

from fastapi import APIRouter, FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from loramux.adapters.errors import AdapterError
from loramux.router.errors import RouterError
from loramux.server.edge.answer import EXPERTS_HEADER
from loramux.server.edge.door import Door
from loramux.server.edge.failures import ErrorAnswer, describe, error_response
from loramux.server.edge.keys import Keys
from loramux.server.edge.trace import Trace
from loramux.server.engine.protocol import EngineError
from loramux.server.errors import INVALID, ServerError
from loramux.server.parts import Parts
from loramux.server.routes.admin import admin_routes
from loramux.server.routes.chat import chat_routes
from loramux.server.routes.completions import completion_routes
from loramux.server.routes.embeddings import embedding_routes
from loramux.server.routes.experts import expert_routes
from loramux.server.routes.health import health_routes
from loramux.server.routes.metrics import metrics_routes
from loramux.server.routes.models import model_routes
from loramux.server.routes.playground import playground_routes
from loramux.server.routes.reference import reference_routes
from loramux.server.routes.replicas import replica_routes
from loramux.server.routes.responses import response_routes
from loramux.server.routes.route import route_routes
from loramux.server.routes.tokens import token_routes

log = logging.getLogger("loramux")

ROUTE_GROUPS: tuple[Callable[[Parts], APIRouter], ...] = (
    chat_routes,
    completion_routes,
    embedding_routes,
    response_routes,
    model_routes,
    expert_routes,
    route_routes,
    token_routes,
    admin_routes,
    replica_routes,
    health_routes,
    metrics_routes,
    playground_routes,
    reference_routes,
)


def create_app(parts: Parts) -> FastAPI:
    """The server's routes over `parts`. The engine starts and stops with the app's lifespan."""
    settings = parts.settings
    admin_key = None if settings.admin_key is None else settings.admin_key.get_secret_value()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await parts.engine.start()
        parts.lifecycle.ready()
        try:
            yield
        finally:
            await shut_down(parts)

    app = FastAPI(
        title="loramux",
        lifespan=lifespan,
        openapi_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(Trace, metrics=parts.metrics, traces=parts.traces),
            *_cors(settings.cors_origins),
            Middleware(
                Door,
                host=settings.host,
                allowed_hosts=settings.allowed_hosts,
                body_seconds=settings.body_seconds,
            ),
            Middleware(
                Keys, keys=parts.api_keys, admin_key=admin_key, metrics_need_key=settings.metrics_need_key
            ),
        ],
        exception_handlers={
            HTTPException: _http_error,
            ServerError: _error,
            EngineError: _error,
            AdapterError: _error,
            RouterError: _error,
        },
    )
    for group in ROUTE_GROUPS:
        app.include_router(group(parts))
    return app


def _cors(origins: Sequence[str]) -> list[Middleware]:
    """Pages of these origins may call; before all checks, so that a page can read what they refuse."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[EXPERTS_HEADER, "x-request-id"],
        )
    ]


async def shut_down(parts: Parts) -> None:
    """Take no more work, let what runs finish for `drain_seconds`, end the rest. Once is enough."""
    if not parts.lifecycle.stop():
        return
    await parts.lifecycle.idle(parts.settings.drain_seconds)
    await parts.engine.stop(0)
    await parts.router.close()
    parts.prompts.close()
    await asyncio.to_thread(parts.traces.close)


async def _http_error(request: Request, error: Exception) -> Response:
    """404 and 405 of the router, as OpenAI errors."""
    if not isinstance(error, HTTPException):
        raise error
    code = {404: "unknown_route", 405: "method_not_allowed"}.get(error.status_code)
    message = f"{request.method} {request.scope['path'][:200]}: {error.detail}"
    return error_response(
        ErrorAnswer(error.status_code, message, INVALID, code=code, headers=error.headers or {})
    )


async def _error(_: Request, error: Exception) -> Response:
    answer = describe(error)
    if answer.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        log.error("a request failed", exc_info=error)
    return error_response(answer)
