"""`POST /tokenize` and `POST /detokenize`: requests and answers, with vLLM's field names."""

from typing import Any, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from loramux.server.wire.chat import Message
from loramux.server.wire.strict import StrictModel, TokenId, field_error, limits_of, no_longer_than


class TokenizeRequest(StrictModel):
    """A text, or a chat that is rendered with the template first."""

    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    model: str | None = Field(None, max_length=256)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @field_validator("messages", mode="before")
    @classmethod
    def _messages(cls, value: object, info: ValidationInfo) -> object:
        return no_longer_than(value, limits_of(info).max_messages)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise field_error("prompt", "or messages is required, and not both")
        return self


class DetokenizeRequest(StrictModel):
    """Token ids."""

    tokens: list[TokenId]
    model: str | None = Field(None, max_length=256)


def tokenized(ids: list[int], pieces: list[str] | None, context: int) -> dict[str, Any]:
    """The answer of `/tokenize`."""
    return {"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": pieces}
