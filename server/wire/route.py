"""`POST /v1/route`: the request."""

from typing import Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from loramux.server.wire.chat import Message
from loramux.server.wire.generation import RoutingFields
from loramux.server.wire.strict import StrictModel, field_error, limits_of, no_longer_than


class RouteRequest(StrictModel):
    """A text, or a chat whose last user message is the routing text."""

    input: str | None = Field(None, min_length=1)
    messages: list[Message] | None = Field(None, min_length=1)
    routing: RoutingFields | None = None
    model: str | None = Field(None, max_length=256)

    @field_validator("messages", mode="before")
    @classmethod
    def _messages(cls, value: object, info: ValidationInfo) -> object:
        return no_longer_than(value, limits_of(info).max_messages)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.input is None) == (self.messages is None):
            raise field_error("input", "or messages is required, and not both")
        return self
