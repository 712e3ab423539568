"""`POST /v1/completions`."""

from fastapi import APIRouter, Request, Response

from loramux.server.edge.answer import StreamedAnswer, WorkedAnswer
from loramux.server.edge.body import read_model
from loramux.server.parts import Parts
from loramux.server.render.completions import CompletionRenderer
from loramux.server.render.envelope import Envelope
from loramux.server.wire.completions import CompletionRequest


def completion_routes(parts: Parts) -> APIRouter:
    """The route."""
    router = APIRouter()
    limits = parts.settings.limits

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = parts.sampling.fill(await read_model(CompletionRequest, request, limits))
        ask = await parts.intake.completion(asked)
        envelope = Envelope(
            kind="text_completion",
            model=asked.model,
            fingerprint=parts.fingerprint,
            usage=asked.stream_options is not None and asked.stream_options.include_usage,
            continuous_usage=asked.stream_options is not None and asked.stream_options.continuous_usage,
        )
        renderer = CompletionRenderer(envelope, parts.vocabulary, logprobs=asked.logprobs is not None)
        events = parts.pipeline.run(ask)
        return (
            StreamedAnswer(renderer.chunks(events)) if asked.stream else WorkedAnswer(renderer.whole(events))
        )

    return router
