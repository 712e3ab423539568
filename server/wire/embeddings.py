"""`POST /v1/embeddings`: the request and the answer."""

import base64
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationInfo, WithJsonSchema, field_validator

from loramux.server.wire.strict import StrictModel, limits_of, no_longer_than

_TEXT = {"type": "string", "minLength": 1}
_INPUT = {"anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": _TEXT}]}


class EmbeddingsRequest(StrictModel):
    """An OpenAI embeddings request. Token ids are not taken: they would be those of another tokenizer."""

    model: str = Field(min_length=1, max_length=256)
    input: Annotated[list[str], WithJsonSchema(_INPUT)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = Field(None, max_length=512)

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset({"metadata", "safety_identifier"})

    @field_validator("input", mode="before")
    @classmethod
    def _texts(cls, value: object, info: ValidationInfo) -> list[str]:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError("must be a text or a list of texts, and not empty; token ids are not taken")
        no_longer_than(texts, limits_of(info).max_embedding_inputs)
        if not all(texts):
            raise ValueError("may not hold an empty text")
        return texts


def embeddings_answer(
    model: str, vectors: npt.NDArray[np.float32], tokens: int, *, as_base64: bool
) -> dict[str, Any]:
    """The answer: vectors [n, d] as lists of numbers, or as base64 of their float32 bytes, little-endian."""
    rows: list[Any] = vectors.tolist()
    if as_base64:
        rows = [base64.b64encode(row.astype("<f4").tobytes()).decode("ascii") for row in vectors]
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": n, "embedding": row} for n, row in enumerate(rows)],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
