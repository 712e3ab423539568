"""`POST /v1/route`: the decision alone, nothing generated."""

from fastapi import APIRouter, Request, Response

from loramux.server.edge.body import read_json
from loramux.server.errors import RequestError
from loramux.server.intake import routing_text
from loramux.server.parts import Parts
from loramux.server.wire.route import RouteRequest
from loramux.server.wire.strict import encode_json, parse


def route_routes(parts: Parts) -> APIRouter:
    """The route."""
    router = APIRouter()
    limits = parts.settings.limits

    @router.post("/v1/route")
    async def route(request: Request) -> Response:
        asked = parse(RouteRequest, await read_json(request, limits.max_body_bytes), limits)
        if asked.model not in (None, "auto"):
            raise RequestError("only model auto is routed", param="model", code="invalid_value")
        turns = [message.turn for message in asked.messages or ()]
        text = asked.input if asked.messages is None else routing_text(turns)
        with parts.lifecycle.working():
            explained = await parts.selector.explain(text or "", asked.routing, chart=asked.map)
        return Response(encode_json(explained), media_type="application/json")

    return router
