"""`GET /health`: process and engine live. `GET /ready`: it takes work. `GET /version`: its release."""

from importlib.metadata import version as installed_version

from fastapi import APIRouter, Response

from loramux.server.edge.answer import JsonAnswer
from loramux.server.errors import NotReady
from loramux.server.lifecycle import Phase
from loramux.server.parts import Parts


def health_routes(parts: Parts) -> APIRouter:
    """The routes."""
    router = APIRouter()

    def refuse_dead() -> None:
        reason = parts.engine.stats().dead
        if reason is not None:
            raise NotReady(reason)

    @router.get("/health")
    async def health() -> Response:
        refuse_dead()
        return JsonAnswer({"status": "ok"})

    @router.get("/ready")
    async def ready() -> Response:
        refuse_dead()
        if parts.lifecycle.phase is not Phase.READY:
            raise NotReady(f"the server is {parts.lifecycle.phase}")
        if (reason := parts.engine.stats().stalled) is not None:
            raise NotReady(reason)
        return JsonAnswer({"status": "ready"})

    @router.get("/version")
    async def version() -> Response:
        return JsonAnswer({"version": installed_version("loramux")})

    return router
