"""`POST /v1/responses`: the request, and the JSON of its items. Text alone, and nothing is stored."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema

from loramux.server.wire.generation import Effort, GenerationFields
from loramux.server.wire.messages import Message
from loramux.server.wire.strict import (
    MAX_TOKENS,
    StrictModel,
    at_most,
    field_error,
    limits_of,
    no_longer_than,
)
from loramux.server.wire.structured import ANY_OBJECT, Schema, Structure

LOGPROBS = "message.output_text.logprobs"
# The others ask for parts of what tools, images and hidden reasoning leave behind, which no answer here has.
Includable = Literal[
    "message.output_text.logprobs", "reasoning.encrypted_content", "file_search_call.results",
    "web_search_call.results", "web_search_call.action.sources", "message.input_image.image_url",
    "computer_call_output.output.image_url", "code_interpreter_call.outputs",
]  # fmt: skip
# What the parts of an answer are called, and the field that has their text.
_PARTS = {"input_text": "text", "output_text": "text", "refusal": "refusal"}
# What is beside it in an answer that is put back, and says nothing to a model.
_BESIDE = {"annotations", "logprobs", "prompt_cache_breakpoint"}
# Labels that the answer repeats.
_ECHOED = {"metadata", "parallel_tool_calls"}
_CONTENT = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "anyOf": [
                    {
                        "type": "object",
                        "required": ["type", field],
                        "properties": {"type": {"const": kind}, field: {"type": "string"}},
                    }
                    for kind, field in _PARTS.items()
                ]
            },
        },
    ],
    "description": "A text, or its parts.",
}


class InputMessage(StrictModel):
    """A message of the input, or one of an earlier answer put back as it came."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, WithJsonSchema(_CONTENT)]
    id: str | None = Field(None, max_length=256)
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: Literal["commentary", "final_answer"] | None = None

    @field_validator("type", mode="before")
    @classmethod
    def _served(cls, value: object) -> object:
        if value == "item_reference":
            raise ValueError("nothing is stored to refer to; send the item itself (store: false)")
        if value != "message":
            raise ValueError(f"items of type {str(value)[:40]!r} are not supported by this server")
        return value

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, value: object) -> object:
        return "".join(_part(part) for part in value) if isinstance(value, list) else value

    @property
    def message(self) -> Message:
        """The turn of a chat that it is."""
        return Message.model_validate({"role": self.role, "content": self.content})


def _part(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    field = _PARTS.get(kind) if isinstance(kind, str) else None
    if not isinstance(part, dict) or field is None:
        raise ValueError(f"parts of type {str(kind)[:40]!r} are not supported by this server")
    text = part.get(field)
    if set(part) - _BESIDE != {"type", field} or not isinstance(text, str):
        raise ValueError(f"a part of type {kind} has exactly the fields type and {field}")
    return text


def _items(value: object, info: ValidationInfo) -> object:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text or a list of messages, and not empty")
    return no_longer_than(value, limits_of(info).max_messages)


class _AsText:
    """Documents that a text may stand for the list."""

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, {**handler(core_schema), "minItems": 1}]}


class TextFormat(StrictModel):
    """`text.format`: as `response_format` of chats, with the fields of a schema beside its type."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = Field(None, pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = Field(None, max_length=4096)
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool = False

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for name, value in (("name", self.name), ("schema", self.schema_)):
            if (value is not None) != (self.type == "json_schema"):
                what = "is required with" if value is None else "is only allowed with"
                raise field_error(f"text.format.{name}", f"{what} type json_schema")
        return self

    def described(self) -> dict[str, Any]:
        """As it was given."""
        return {"type": self.type, **self.model_dump(by_alias=True, exclude_defaults=True)}

    @property
    def structure(self) -> Structure | None:
        if self.type == "text":
            return None
        if self.schema_ is None:
            return Structure("json", ANY_OBJECT, "text.format")
        return Structure("json", self.schema_, "text.format.schema")


class TextConfig(StrictModel):
    """`text`. `medium` is OpenAI's default, and asks for nothing."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningConfig(StrictModel):
    """`reasoning`: how much of it, for a chat template that knows `reasoning_effort`."""

    effort: Effort | None = None

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset({"generate_summary", "summary"})


class ObfuscationOptions(StrictModel):
    """`stream_options`. Nothing is obfuscated here, so asking for it makes no difference."""

    include_obfuscation: bool = False


class ResponseRequest(GenerationFields):
    """An OpenAI Responses request, with the extensions of chats and their sampling parameters."""

    input: Annotated[list[InputMessage], BeforeValidator(_items), _AsText()]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    include: list[Includable] = Field(default_factory=list, max_length=16)
    top_logprobs: int | None = Field(None, ge=0)
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    truncation: Literal["disabled"] = "disabled"
    metadata: dict[str, str] = Field(default_factory=dict, max_length=16)
    parallel_tool_calls: bool = True
    stream_options: ObfuscationOptions | None = None  # type: ignore[assignment]

    # Tools, of the client's or built in, are refused here until they are served.
    UNSUPPORTED: ClassVar[frozenset[str]] = GenerationFields.UNSUPPORTED - _ECHOED | {
        "access_programs", "background", "background_options", "context_management", "conversation", "image",
        "logprobs", "max_completion_tokens", "max_tokens", "max_tool_calls", "messages", "n",
        "previous_response_id", "prompt", "prompt_cache_options", "response_format",
    }  # fmt: skip

    @field_validator("top_logprobs")
    @classmethod
    def _top(cls, value: int | None, info: ValidationInfo) -> int | None:
        return at_most(value, limits_of(info).max_top_logprobs)

    @field_validator("metadata")
    @classmethod
    def _short(cls, value: dict[str, str]) -> dict[str, str]:
        for key, text in value.items():
            if len(key) > 64 or len(text) > 512:
                raise ValueError("keys have at most 64 characters, values 512")
        return value

    @model_validator(mode="after")
    def _response_consistent(self) -> Self:
        if self.top_logprobs and not self.logprobs_wanted:
            raise field_error("top_logprobs", f"is only allowed when include has {LOGPROBS}")
        return self

    @property
    def logprobs_wanted(self) -> bool:
        return LOGPROBS in self.include

    @property
    def format(self) -> TextFormat:
        """What the text has to look like."""
        return (None if self.text is None else self.text.format) or TextFormat.model_validate({})

    @property
    def _structures(self) -> list[Structure]:
        formatted = self.format.structure
        return [*([] if formatted is None else [formatted]), *super()._structures]

    @property
    def messages(self) -> list[Message]:
        """Instructions and input as one chat."""
        chat = [item.message for item in self.input]
        if self.instructions is not None:
            chat.insert(0, Message.model_validate({"role": "system", "content": self.instructions}))
        return chat


def output_text(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    """The only part of a message here."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def output_message(id: str, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    """The only item of an output here."""
    return {"id": id, "type": "message", "status": status, "role": "assistant", "content": content}


def response_body(request: ResponseRequest, id: str, created: int, **state: Any) -> dict[str, Any]:
    """The response object: what was asked, and `state`: status, output, usage and so on."""
    effort = None if request.reasoning is None else request.reasoning.effort
    return {
        "id": id,
        "object": "response",
        "created_at": created,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata,
        "model": request.model,
        "parallel_tool_calls": request.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": effort, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": request.temperature,
        "text": {"format": request.format.described()},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": request.top_p,
        "truncation": request.truncation,
        "usage": None,
        "user": request.user,
        **state,
    }
