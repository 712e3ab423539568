"""`POST /tokenize` and `POST /detokenize`."""

from fastapi import APIRouter, Request, Response

from loramux.server.edge.body import read_json
from loramux.server.parts import Parts
from loramux.server.wire.strict import encode_json, parse
from loramux.server.wire.tokenize import DetokenizeRequest, TokenizeRequest, tokenized


def token_routes(parts: Parts) -> APIRouter:
    """The routes."""
    router = APIRouter()
    limits = parts.settings.limits

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        asked = parse(TokenizeRequest, await read_json(request, limits.max_body_bytes), limits)
        _known(parts, asked.model)
        if asked.messages is not None:
            chat = [message.turn for message in asked.messages]
            ids = await parts.prompts.chat(chat, add_generation_prompt=asked.add_generation_prompt)
        else:
            ids = await parts.prompts.text(asked.prompt or "", add_special_tokens=asked.add_special_tokens)
        pieces = [parts.vocabulary.name(token) for token in ids] if asked.return_token_strs else None
        answer = tokenized(list(ids), pieces, parts.prompts.max_context)
        return Response(encode_json(answer), media_type="application/json")

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        asked = parse(DetokenizeRequest, await read_json(request, limits.max_body_bytes), limits)
        _known(parts, asked.model)
        text = await parts.prompts.detokenize(asked.tokens)
        return Response(encode_json({"prompt": text}), media_type="application/json")

    return router


def _known(parts: Parts, model: str | None) -> None:
    """All models of a server share one tokenizer; the name is only checked."""
    if model is not None:
        parts.catalog.resolve(model)
