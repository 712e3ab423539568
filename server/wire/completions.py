"""`POST /v1/completions`: the request, and the JSON of its choices."""

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, ValidationInfo, WithJsonSchema, field_validator, model_validator

from loramux.server.wire.generation import GenerationFields
from loramux.server.wire.strict import MAX_TOKENS, at_most, field_error, limits_of, no_longer_than

Prompt = str | tuple[int, ...]
_TEXT = {"type": "string", "minLength": 1}
_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKENS}}
_PROMPT = {
    "anyOf": [_TEXT, _IDS, {"type": "array", "minItems": 1, "items": {"anyOf": [_TEXT, _IDS]}}],
    "description": "A text or a list of token ids, or a list of either.",
}


class CompletionRequest(GenerationFields):
    """An OpenAI completions request, with `lora` and `routing` as extensions."""

    prompt: Annotated[list[Prompt], WithJsonSchema(_PROMPT)]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0)

    UNSUPPORTED: ClassVar[frozenset[str]] = GenerationFields.UNSUPPORTED | {
        "max_completion_tokens", "top_logprobs", "messages",
    }  # fmt: skip

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompt(cls, value: object, info: ValidationInfo) -> list[Prompt]:
        if isinstance(value, str):
            return [_prompt_text(value)]
        if not isinstance(value, list) or not value:
            raise ValueError("must be a text, a list of token ids, or a list of either, and not empty")
        if _is_id(value[0]):
            return [_prompt_ids(value)]
        no_longer_than(value, limits_of(info).max_prompts)
        return [_prompt_text(item) if isinstance(item, str) else _prompt_ids(item) for item in value]

    @field_validator("logprobs")
    @classmethod
    def _logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        return at_most(value, limits_of(info).max_top_logprobs)

    @model_validator(mode="after")
    def _completion_consistent(self, info: ValidationInfo) -> Self:
        limit = limits_of(info).max_sequences
        if len(self.prompt) * self.n > limit:
            raise field_error("n", f"times {len(self.prompt)} prompts is over {limit} sequences")
        # Base and best expert score each prompt once beside what is generated.
        if self.explains and len(self.prompt) * (self.n + 2) > limit:
            raise field_error("routing.explain", f"of {len(self.prompt)} prompts is over {limit} sequences")
        if self.max_tokens == 0 and not self.echo:
            raise field_error("max_tokens", "may be 0 only with echo")
        return self


def completion_logprobs(entries: list[dict[str, Any]], offset: int) -> dict[str, Any]:
    """The `logprobs` object of a choice; `offset` is where in the choice's text the first entry stands."""
    offsets: list[int] = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry["text"])
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [entry["top"] for entry in entries],
        "text_offset": offsets,
    }


def completion_choice(
    index: int, *, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None
) -> dict[str, Any]:
    """One choice, of a chunk or of a whole answer."""
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _prompt_text(value: str) -> str:
    if not value:
        raise ValueError("may not be empty")
    return value


def _prompt_ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text, a list of token ids, or a list of either, and not empty")
    if not all(_is_id(item) and 0 <= item <= MAX_TOKENS for item in value):
        raise ValueError("token ids must be integers from 0 up")
    return tuple(value)
