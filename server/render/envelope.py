"""What every chunk and every whole answer of a request has in common."""

import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

from loramux.server.edge.answer import EXPERTS_HEADER
from loramux.server.events import Closed, Event, Opened

Body = tuple[Mapping[str, Any], Mapping[str, str]]
Events = AsyncGenerator[Event]


@dataclass(frozen=True, slots=True)
class Envelope:
    """Identity of an answer.

    `usage` says whether chunks carry the field at all, `continuous_usage` whether each has the counts so far.
    """

    kind: str
    model: str
    fingerprint: str
    usage: bool = False
    continuous_usage: bool = False
    prefix: str = "cmpl"
    created: int = field(default_factory=lambda: int(time.time()))
    serial: str = field(default_factory=lambda: uuid.uuid4().hex)

    def body(self, choices: list[dict[str, Any]], **extra: Any) -> dict[str, Any]:
        """A chunk or answer around `choices`."""
        return {
            "id": f"{self.prefix}-{self.serial}",
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **extra,
        }

    def chunk(self, choices: list[dict[str, Any]], **extra: Any) -> dict[str, Any]:
        """A chunk; with `include_usage`, `usage` is null in all but the last."""
        if self.usage:
            extra.setdefault("usage", None)
        return self.body(choices, **extra)


def usage(closed: Closed) -> dict[str, Any]:
    """The `usage` object."""
    return {
        "prompt_tokens": closed.prompt_tokens,
        "completion_tokens": closed.completion_tokens,
        "total_tokens": closed.prompt_tokens + closed.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": closed.cached_tokens},
    }


def headers(opened: Opened) -> dict[str, str]:
    """The response headers that the decision is known by."""
    return {EXPERTS_HEADER: opened.header()}
