"""`POST /tokenize` and `POST /detokenize`: requests and answers, with vLLM's field names."""

from typing import Any, ClassVar

from pydantic import Field

from loramux.server.wire.messages import Messages, TextOrChat
from loramux.server.wire.strict import StrictModel, TokenId


class TokenizeRequest(TextOrChat):
    """A text, or a chat that is rendered with the template first."""

    TEXT: ClassVar[str] = "prompt"

    prompt: str | None = None
    messages: Messages | None = None
    model: str | None = Field(None, max_length=256)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(StrictModel):
    """Token ids."""

    tokens: list[TokenId]
    model: str | None = Field(None, max_length=256)


def tokenized(ids: list[int], pieces: list[str] | None, context: int) -> dict[str, Any]:
    """The answer of `/tokenize`."""
    return {"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": pieces}
