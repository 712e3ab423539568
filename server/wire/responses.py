"""`POST /v1/responses`: the request, and the JSON of an answer around its items. Nothing is stored."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema

from loramux.server.text.prompts import Turn
from loramux.server.wire.generation import Effort, GenerationFields
from loramux.server.wire.response_items import InputItem, turns
from loramux.server.wire.strict import (
    MAX_TOKENS,
    StrictModel,
    at_most,
    field_error,
    limits_of,
    no_longer_than,
)
from loramux.server.wire.structured import ANY_OBJECT, Schema, Structure
from loramux.server.wire.tools import FunctionToolFields, NamedFunctionTool

LOGPROBS = "message.output_text.logprobs"
# The others ask for parts of what tools, images and hidden reasoning leave behind, which no answer here has.
Includable = Literal[
    "message.output_text.logprobs", "reasoning.encrypted_content", "file_search_call.results",
    "web_search_call.results", "web_search_call.action.sources", "message.input_image.image_url",
    "computer_call_output.output.image_url", "code_interpreter_call.outputs",
]  # fmt: skip


def _items(value: object, info: ValidationInfo) -> object:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text or a list of items, and not empty")
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


class ResponseRequest(GenerationFields, FunctionToolFields):
    """An OpenAI Responses request, with the extensions of chats and their sampling parameters."""

    input: Annotated[list[InputItem], BeforeValidator(_items), _AsText()]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    include: list[Includable] = Field(default_factory=list, max_length=16)
    top_logprobs: int | None = Field(None, ge=0)
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    truncation: Literal["disabled"] = "disabled"
    metadata: dict[str, str] = Field(default_factory=dict, max_length=16)
    stream_options: ObfuscationOptions | None = None  # type: ignore[assignment]

    # Metadata is repeated in the answer.
    UNSUPPORTED: ClassVar[frozenset[str]] = GenerationFields.UNSUPPORTED - {
        "metadata",
        *FunctionToolFields.model_fields,
    } | {
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
    def turns(self) -> list[Turn]:
        """Instructions and input as one chat."""
        told = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        return [*told, *turns(self.input)]


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
        "tool_choice": _as_given(request.tool_choice),
        "tools": [tool.model_dump() for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": request.top_p,
        "truncation": request.truncation,
        "usage": None,
        "user": request.user,
        **state,
    }


def _as_given(choice: NamedFunctionTool | str | None) -> dict[str, Any] | str:
    return choice.model_dump() if isinstance(choice, NamedFunctionTool) else choice or "auto"
