"""`POST /v1/route`: the decision alone, nothing generated."""

from fastapi import APIRouter, Request, Response

from loramux.server.edge.answer import JsonAnswer
from loramux.server.edge.body import read_model
from loramux.server.errors import RequestError
from loramux.server.intake import routing_text
from loramux.server.parts import Parts
from loramux.server.wire.route import RouteRequest


def route_routes(parts: Parts) -> APIRouter:
    """The route."""
    router = APIRouter()
    limits = parts.settings.limits

    @router.post("/v1/route")
    async def route(request: Request) -> Response:
        asked = await read_model(RouteRequest, request, limits)
        if asked.model not in (None, "auto"):
            raise RequestError("only model auto is routed", param="model", code="invalid_value")
        turns = [message.turn for message in asked.messages or ()]
        text = asked.input if asked.messages is None else routing_text(turns)
        with parts.lifecycle.working():
            explained = await parts.selector.explain(text or "", asked.routing, chart=asked.map)
        return JsonAnswer(explained)

    return router
