"""Chat messages, and requests that take them in place of a text."""

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
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from loramux.server.text.prompts import Turn
from loramux.server.wire.strict import NESTED_UNSUPPORTED, StrictModel, field_error, limits_of, no_longer_than
from loramux.server.wire.tools import Calls

# What an answer of this or another server carries beside role and content, and says nothing to a model.
_LABELS = NESTED_UNSUPPORTED | {"reasoning_content", "tool_calls"}


_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
_CONTENT = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": _PART}],
    "description": "A text, or its parts; of an assistant, null where it said nothing.",
}


class Message(StrictModel):
    """One turn; parts are joined into one text.

    An answer put back as it came is taken: what is null or empty in it is left out, and an assistant that
    said nothing has the empty text. One that refused said its refusal.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, WithJsonSchema(_CONTENT)]
    name: str | None = Field(None, min_length=1, max_length=256)
    tool_calls: Calls | None = None
    tool_call_id: str | None = Field(None, min_length=1, max_length=256)

    UNSUPPORTED: ClassVar[frozenset[str]] = _LABELS - {"tool_calls"}

    @property
    def turn(self) -> Turn:
        """As the chat template takes it."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls is not None:
            turn["tool_calls"] = [call.described() for call in self.tool_calls]
        given = {"name": self.name, "tool_call_id": self.tool_call_id}
        return turn | {key: value for key, value in given.items() if value is not None}

    @model_validator(mode="after")
    def _calls_and_their_results(self) -> Self:
        if self.tool_calls is not None and self.role != "assistant":
            raise field_error(".tool_calls", "are an assistant's")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise field_error(".tool_call_id", "is required in messages of role tool, and in no others")
        return self

    @model_validator(mode="before")
    @classmethod
    def _replayed(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        kept = {
            key: item
            for key, item in value.items()
            if not (key in _LABELS and item in (None, [])) and not (key not in _KNOWN and item is None)
        }
        if kept.get("role") != "assistant":
            return kept
        refused = isinstance(kept.get("refusal"), str)
        silent = "content" in kept or refused or "tool_calls" in kept
        if kept.get("content") in (None, "") and silent:
            # A refusal is what the assistant said in place of a content.
            kept["content"] = kept.pop("refusal") if refused else ""
        elif refused and isinstance(kept["content"], str):
            # Or after one.
            kept["content"] = f"{kept['content']}\n{kept.pop('refusal')}"
        return kept

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, value: object) -> object:
        if not isinstance(value, list):
            return value
        texts: list[str] = []
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text":
                raise ValueError(f"only parts of type text are supported, not {str(kind)[:40]!r}")
            if set(part) - {"cache_control", "annotations"} != {"type", "text"} or not isinstance(
                part["text"], str
            ):
                raise ValueError("a text part has exactly the fields type and text")
            texts.append(part["text"])
        return "".join(texts)


_KNOWN = frozenset(Message.model_fields)


def _few_enough(value: object, info: ValidationInfo) -> object:
    return no_longer_than(value, limits_of(info).max_messages)


Messages = Annotated[list[Message], Field(min_length=1), BeforeValidator(_few_enough)]


class TextOrChat(StrictModel):
    """A text in the field that `TEXT` names, or a chat in `messages`: one of them, not both.

    Subclasses declare both fields: the order of declaration decides which of several faults is named.
    """

    TEXT: ClassVar[str]

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in (self.TEXT, "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise field_error(self.TEXT, "or messages is required, and not both")
        return self

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """With that rule in the document, so that who makes requests of it makes valid ones."""
        found = handler(schema)
        names = (cls.TEXT, "messages")
        handler.resolve_ref_schema(found)["oneOf"] = [
            {"required": [one], "properties": {one: {"not": {"type": "null"}}, other: {"type": "null"}}}
            for one, other in (names, names[::-1])
        ]
        return found
