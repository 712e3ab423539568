"""`GET /v1/experts`: what the experts are for, what they are worth, and the map of their centroids."""

from fastapi import APIRouter, Response

from loramux.server.edge.answer import JsonAnswer
from loramux.server.parts import Parts
from loramux.server.wire.experts import expert_list


def expert_routes(parts: Parts) -> APIRouter:
    """The route."""
    router = APIRouter()
    catalog, selector = parts.catalog, parts.selector

    @router.get("/v1/experts")
    async def experts() -> Response:
        body = expert_list(catalog.base, catalog.expert_cards(), selector.chart())
        return JsonAnswer(body)

    return router
