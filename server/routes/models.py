"""`GET /v1/models` and `GET /v1/models/{model}`."""

from fastapi import APIRouter, Response

from loramux.server.edge.answer import JsonAnswer
from loramux.server.parts import Parts
from loramux.server.wire.models import model_list


def model_routes(parts: Parts) -> APIRouter:
    """The routes."""
    router = APIRouter()
    catalog = parts.catalog

    @router.get("/v1/models")
    async def models() -> Response:
        return JsonAnswer(model_list(catalog.cards()))

    # A base id may be a hub id, with a slash in it.
    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        return JsonAnswer(catalog.card(model))

    return router
