"""`POST /v1/chat/completions`."""

from fastapi import APIRouter, Request, Response

from loramux.server.edge.answer import StreamedAnswer, WorkedAnswer
from loramux.server.edge.body import read_model
from loramux.server.parts import Parts
from loramux.server.render.chat import ChatRenderer
from loramux.server.render.envelope import Envelope
from loramux.server.wire.chat import ChatRequest


def chat_routes(parts: Parts) -> APIRouter:
    """The route."""
    router = APIRouter()
    limits = parts.settings.limits

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = parts.sampling.fill(await read_model(ChatRequest, request, limits))
        ask = await parts.intake.chat(asked)
        envelope = Envelope(
            kind="chat.completion.chunk" if asked.stream else "chat.completion",
            prefix="chatcmpl",
            model=asked.model,
            fingerprint=parts.fingerprint,
            usage=asked.stream_options is not None and asked.stream_options.include_usage,
            continuous_usage=asked.stream_options is not None and asked.stream_options.continuous_usage,
        )
        renderer = ChatRenderer(envelope, parts.vocabulary, logprobs=asked.logprobs)
        events = parts.pipeline.run(ask)
        return (
            StreamedAnswer(renderer.chunks(events)) if asked.stream else WorkedAnswer(renderer.whole(events))
        )

    return router
