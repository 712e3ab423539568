"""`POST /v1/route`: the request."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from loramux.server.wire.generation import RoutingFields
from loramux.server.wire.messages import Messages, TextOrChat
from loramux.server.wire.strict import field_error


class RouteRequest(TextOrChat):
    """A text, or a chat whose last user message is the routing text."""

    TEXT: ClassVar[str] = "input"

    input: str | None = Field(None, min_length=1)
    messages: Messages | None = None
    routing: RoutingFields | None = None
    map: bool = False
    model: str | None = Field(None, max_length=256)

    @model_validator(mode="after")
    def _nothing_to_explain(self) -> Self:
        if self.routing is not None and self.routing.explain:
            raise field_error("routing.explain", "goes with an answer; a decision alone runs no model")
        return self
