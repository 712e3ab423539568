"""Answers of `/v1/responses`: one message, whole or as the events of a stream."""

import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from loramux.server.edge.failures import ErrorAnswer
from loramux.server.events import Closed, Delta, Opened
from loramux.server.render.envelope import Body, Events, headers
from loramux.server.text.scores import chat_entry
from loramux.server.text.vocabulary import Vocabulary
from loramux.server.wire.responses import ResponseRequest, output_message, output_text, response_body

_PLACE = {"output_index": 0, "content_index": 0}


@dataclass(slots=True)
class ResponseRenderer:
    """Renders one request's events, and numbers those of a stream."""

    request: ResponseRequest
    vocabulary: Vocabulary
    created: int = field(default_factory=lambda: int(time.time()))
    serial: str = field(default_factory=lambda: uuid.uuid4().hex)
    _text: list[str] = field(default_factory=list, init=False)
    _entries: list[dict[str, Any]] = field(default_factory=list, init=False)
    _finish: str | None = field(default=None, init=False)
    _extra: dict[str, Any] = field(default_factory=dict, init=False)
    _sent: int = field(default=0, init=False)

    async def events(self, events: Events) -> AsyncGenerator[Body]:
        """OpenAI's sequence: the response, its item and part are opened, grow, and are closed again."""
        first: dict[str, str] = {}
        async with aclosing(events) as items:
            async for event in items:
                match event:
                    case Opened():
                        first = headers(event)
                        bodies = self._opened(event)
                    case Delta():
                        bodies = self._grown(event)
                    case Closed():
                        bodies = self._closed(event)
                for body in bodies:
                    yield body, first

    async def whole(self, events: Events) -> Body:
        """The same events, folded into one answer."""
        body: Mapping[str, Any] = {}
        first: Mapping[str, str] = {}
        async with aclosing(self.events(events)) as bodies:
            async for body, first in bodies:  # noqa: B007
                pass
        return body["response"], first

    def failed(self, answer: ErrorAnswer) -> Mapping[str, Any]:
        """The event that ends a stream whose work failed, with what was said until then."""
        error = {"code": answer.code or answer.kind, "message": answer.message}
        output = [self._message("incomplete")]
        return self._event("response.failed", response=self._response("failed", output, error=error))

    def _opened(self, event: Opened) -> list[dict[str, Any]]:
        self._extra["loramux"] = event.body()
        begun = self._response("in_progress", [])
        return [
            self._event("response.created", response=begun),
            self._event("response.in_progress", response=begun),
            self._event(
                "response.output_item.added",
                output_index=0,
                item=output_message(self._item, "in_progress", []),
            ),
            self._part("response.content_part.added", part=output_text("", [])),
        ]

    def _grown(self, event: Delta) -> list[dict[str, Any]]:
        entries = [chat_entry(self.vocabulary, token) for token in event.tokens] if self._scored else []
        self._finish = event.finish or self._finish
        if not event.text and not entries:
            return []
        self._text.append(event.text)
        self._entries += entries
        return [self._part("response.output_text.delta", delta=event.text, logprobs=entries)]

    def _closed(self, event: Closed) -> list[dict[str, Any]]:
        cut = self._finish == "length"
        status = "incomplete" if cut else "completed"
        message = self._message(status)
        self._extra["usage"] = _usage(event)
        if event.explanation is not None:
            self._extra["loramux"] = {**self._extra["loramux"], "explain": event.explanation}
        if cut:
            self._extra["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self._extra["completed_at"] = int(time.time())
        part = message["content"][0]
        return [
            self._part("response.output_text.done", text=part["text"], logprobs=part["logprobs"]),
            self._part("response.content_part.done", part=part),
            self._event("response.output_item.done", output_index=0, item=message),
            self._event(f"response.{status}", response=self._response(status, [message])),
        ]

    @property
    def _scored(self) -> bool:
        return self.request.logprobs_wanted

    @property
    def _item(self) -> str:
        return f"msg_{self.serial}"

    def _message(self, status: str) -> dict[str, Any]:
        return output_message(self._item, status, [output_text("".join(self._text), self._entries)])

    def _response(self, status: str, output: list[dict[str, Any]], **extra: Any) -> dict[str, Any]:
        return response_body(
            self.request,
            f"resp_{self.serial}",
            self.created,
            status=status,
            output=output,
            **self._extra,
            **extra,
        )

    def _part(self, kind: str, **fields: Any) -> dict[str, Any]:
        """An event about the part."""
        return self._event(kind, item_id=self._item, **_PLACE, **fields)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._sent += 1
        return {"type": kind, "sequence_number": self._sent - 1, **fields}


def _usage(closed: Closed) -> dict[str, Any]:
    """The `usage` object, by the names it has here."""
    return {
        "input_tokens": closed.prompt_tokens,
        "input_tokens_details": {"cached_tokens": closed.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": closed.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": closed.prompt_tokens + closed.completion_tokens,
    }
