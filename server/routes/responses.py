"""`POST /v1/responses`."""

from fastapi import APIRouter, Request, Response

from loramux.server.edge.answer import NamedEvents, WorkedAnswer
from loramux.server.edge.body import read_model
from loramux.server.parts import Parts
from loramux.server.render.responses import ResponseRenderer
from loramux.server.wire.responses import ResponseRequest


def response_routes(parts: Parts) -> APIRouter:
    """The route."""
    router = APIRouter()
    limits = parts.settings.limits

    @router.post("/v1/responses")
    async def responses(request: Request) -> Response:
        asked = parts.sampling.fill(await read_model(ResponseRequest, request, limits))
        ask = await parts.intake.response(asked)
        renderer = ResponseRenderer(asked, parts.vocabulary)
        events = parts.pipeline.run(ask)
        if asked.stream:
            return NamedEvents(renderer.events(events), renderer.failed)
        return WorkedAnswer(renderer.whole(events))

    return router
