"""`POST /v1/embeddings`: vectors of the encoder that routes."""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from loramux.server.edge.answer import WorkedAnswer
from loramux.server.edge.body import read_model
from loramux.server.errors import RequestError, UnknownModel
from loramux.server.parts import Parts
from loramux.server.wire.embeddings import EmbeddingsRequest, embeddings_answer


def embedding_routes(parts: Parts) -> APIRouter:
    """The route."""
    router = APIRouter()
    limits = parts.settings.limits

    async def embed(asked: EmbeddingsRequest) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        spec = parts.router.encoder
        if asked.model not in ("auto", spec.id):
            raise UnknownModel(asked.model, known=("auto", spec.id))
        if asked.dimensions not in (None, spec.dimension):
            raise RequestError(
                f"the encoder's vectors have {spec.dimension} dimensions and are not cut",
                param="dimensions",
                code="invalid_value",
            )
        with parts.lifecycle.working():
            found = await parts.router.embed(asked.input)
        for number, (cut, blank) in enumerate(zip(found.truncated, found.blank, strict=True)):
            if cut or blank:
                where = f"input[{number}]" if len(asked.input) > 1 else "input"
                raise RequestError(
                    f"the encoder's maximum context length is {spec.max_tokens} tokens; {where} is too long"
                    if cut
                    else f"{where} holds nothing that the encoder can read",
                    param=where,
                    code="context_length_exceeded" if cut else "invalid_value",
                )
        as_base64 = asked.encoding_format == "base64"
        return embeddings_answer(spec.id, found.vectors, sum(found.tokens), as_base64=as_base64), {}

    @router.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        asked = await read_model(EmbeddingsRequest, request, limits)
        return WorkedAnswer(embed(asked))

    return router
