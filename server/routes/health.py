"""`GET /health`: the process lives. `GET /ready`: it takes work."""

from fastapi import APIRouter, Response

from loramux.server.errors import NotReady
from loramux.server.lifecycle import Phase
from loramux.server.parts import Parts
from loramux.server.wire.strict import encode_json


def health_routes(parts: Parts) -> APIRouter:
    """The routes."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        return Response(encode_json({"status": "ok"}), media_type="application/json")

    @router.get("/ready")
    async def ready() -> Response:
        if parts.lifecycle.phase is not Phase.READY:
            raise NotReady(f"the server is {parts.lifecycle.phase}")
        return Response(encode_json({"status": "ready"}), media_type="application/json")

    return router
