"""`POST /v1/route`: the request."""

from typing import ClassVar

from pydantic import Field

from loramux.server.wire.generation import RoutingFields
from loramux.server.wire.messages import Messages, TextOrChat


class RouteRequest(TextOrChat):
    """A text, or a chat whose last user message is the routing text."""

    TEXT: ClassVar[str] = "input"

    input: str | None = Field(None, min_length=1)
    messages: Messages | None = None
    routing: RoutingFields | None = None
    map: bool = False
    model: str | None = Field(None, max_length=256)
