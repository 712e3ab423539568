"""`POST /tokenize` and `POST /detokenize`."""

from fastapi import APIRouter, Request, Response

from loramux.server.edge.answer import JsonAnswer
from loramux.server.edge.body import read_model
from loramux.server.parts import Parts
from loramux.server.wire.tokenize import DetokenizeRequest, TokenizeRequest, tokenized


def token_routes(parts: Parts) -> APIRouter:
    """The routes."""
    router = APIRouter()
    limits = parts.settings.limits

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        asked = await read_model(TokenizeRequest, request, limits)
        _known(parts, asked.model)
        if asked.messages is not None:
            chat = [message.turn for message in asked.messages]
            ids = await parts.prompts.chat(chat, add_generation_prompt=asked.add_generation_prompt)
        else:
            ids = await parts.prompts.text(asked.prompt or "", add_special_tokens=asked.add_special_tokens)
        pieces = [parts.vocabulary.name(token) for token in ids] if asked.return_token_strs else None
        answer = tokenized(list(ids), pieces, parts.prompts.max_context)
        return JsonAnswer(answer)

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        asked = await read_model(DetokenizeRequest, request, limits)
        _known(parts, asked.model)
        text = await parts.prompts.detokenize(asked.tokens)
        return JsonAnswer({"prompt": text})

    return router


def _known(parts: Parts, model: str | None) -> None:
    """All models of a server share one tokenizer; the name is only checked."""
    if model is not None:
        parts.catalog.resolve(model)
