"""`GET /v1/models` and `GET /v1/models/{model}`."""

from fastapi import APIRouter, Response

from loramux.server.parts import Parts
from loramux.server.wire.models import model_list
from loramux.server.wire.strict import encode_json


def model_routes(parts: Parts) -> APIRouter:
    """The routes."""
    router = APIRouter()
    catalog = parts.catalog

    @router.get("/v1/models")
    async def models() -> Response:
        return Response(encode_json(model_list(catalog.cards())), media_type="application/json")

    # A base id may be a hub id, with a slash in it.
    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        return Response(encode_json(catalog.card(model)), media_type="application/json")

    return router
