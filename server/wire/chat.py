"""`POST /v1/chat/completions`: the request, and the JSON of whole answers and of chunks."""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from loramux.server.text.template import Value
from loramux.server.text.tool_calls import ToolCall
from loramux.server.wire.generation import Effort, GenerationFields
from loramux.server.wire.messages import Messages
from loramux.server.wire.strict import at_most, field_error, limits_of
from loramux.server.wire.tools import ToolFields


class ChatRequest(GenerationFields, ToolFields):
    """An OpenAI chat request, with `lora` and `routing` as extensions."""

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, Value] | None = Field(None, max_length=32)

    UNSUPPORTED: ClassVar[frozenset[str]] = GenerationFields.UNSUPPORTED - {
        "reasoning_effort",
        *ToolFields.model_fields,
    } | {"echo"}

    @field_validator("top_logprobs")
    @classmethod
    def _top(cls, value: int | None, info: ValidationInfo) -> int | None:
        return at_most(value, limits_of(info).max_top_logprobs)

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _plain(cls, value: object) -> object:
        for name, item in value.items() if isinstance(value, dict) else ():
            if not isinstance(item, Value) or (isinstance(item, str) and len(item) > 1024):
                at = f"chat_template_kwargs.{name[:100]}"
                raise field_error(at, "must be true, false, a number or a string of at most 1024 characters")
        return value

    @model_validator(mode="after")
    def _chat_consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise field_error("top_logprobs", "is only allowed when logprobs is true")
        if self.max_tokens == 0:
            raise field_error("max_tokens", "must be at least 1")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise field_error("max_tokens", "cannot be combined with max_completion_tokens")
        return self


def chat_logprobs(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The `logprobs` object of a choice."""
    return {"content": entries, "refusal": None}


def called(call: ToolCall) -> dict[str, Any]:
    """An entry of `tool_calls` in a whole answer."""
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def call_deltas(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Entries of `tool_calls` in chunks: each call by its name first, then its arguments."""
    deltas: list[dict[str, Any]] = []
    for call in calls:
        head = {**called(call), "function": {"name": call.name, "arguments": ""}}
        deltas.append({"index": call.index, **head})
        deltas.append({"index": call.index, "function": {"arguments": call.arguments}})
    return deltas


def chat_chunk_choice(
    index: int,
    *,
    text: str | None = None,
    first: bool = False,
    logprobs: dict[str, Any] | None = None,
    finish_reason: str | None = None,
    call: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One choice of a chunk; the first of a choice carries the role."""
    delta: dict[str, Any] = {"role": "assistant"} if first else {}
    if text is not None:
        delta["content"] = text
    if call is not None:
        delta["tool_calls"] = [call]
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def chat_choice(
    index: int,
    *,
    text: str,
    logprobs: dict[str, Any] | None,
    finish_reason: str | None,
    calls: Sequence[ToolCall] = (),
) -> dict[str, Any]:
    """One choice of a whole answer; one that only calls has no content."""
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if calls:
        message["content"] = text or None
        message["tool_calls"] = [called(call) for call in calls]
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}
