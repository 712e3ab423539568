"""Chat messages, and requests that take them in place of a text."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from loramux.server.wire.strict import StrictModel, field_error, limits_of, no_longer_than


class Message(StrictModel):
    """One turn; parts are joined into one text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset(
        {"name", "tool_calls", "tool_call_id", "audio", "refusal"}
    )

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
            if set(part) != {"type", "text"} or not isinstance(part["text"], str):
                raise ValueError("a text part has exactly the fields type and text")
            texts.append(part["text"])
        return "".join(texts)


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
