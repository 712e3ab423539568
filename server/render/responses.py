"""Answers of `/v1/responses`: their items, whole or as the events of a stream."""

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
from loramux.server.text.tool_calls import ToolCall
from loramux.server.text.vocabulary import Vocabulary
from loramux.server.wire.response_items import output_call, output_message, output_text
from loramux.server.wire.responses import ResponseRequest, response_body


@dataclass(slots=True)
class _Message:
    """The message that is being said, and where it stands in the output."""

    id: str
    index: int
    text: list[str] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)

    def body(self, status: str) -> dict[str, Any]:
        return output_message(self.id, status, [output_text("".join(self.text), self.entries)])


@dataclass(slots=True)
class ResponseRenderer:
    """Renders one request's events, and numbers those of a stream."""

    request: ResponseRequest
    vocabulary: Vocabulary
    created: int = field(default_factory=lambda: int(time.time()))
    serial: str = field(default_factory=lambda: uuid.uuid4().hex)
    _output: list[dict[str, Any]] = field(default_factory=list, init=False)  # items that are whole
    _message: _Message | None = field(default=None, init=False)
    # Of tokens whose text is not yet known: the middle of a character, a stop string, or a call.
    _pending: list[dict[str, Any]] = field(default_factory=list, init=False)
    _finish: str | None = field(default=None, init=False)
    _extra: dict[str, Any] = field(default_factory=dict, init=False)
    _sent: int = field(default=0, init=False)

    async def events(self, events: Events) -> AsyncGenerator[Body]:
        """OpenAI's sequence: the response and each of its items are opened, grow, and are closed again."""
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
        said = [] if self._message is None else [self._message.body("incomplete")]
        return self._event("response.failed", response=self._response("failed", *said, error=error))

    def _opened(self, event: Opened) -> list[dict[str, Any]]:
        self._extra["loramux"] = event.body()
        begun = self._response("in_progress")
        return [
            self._event("response.created", response=begun),
            self._event("response.in_progress", response=begun),
        ]

    def _grown(self, event: Delta) -> list[dict[str, Any]]:
        if self.request.logprobs_wanted:
            self._pending += [chat_entry(self.vocabulary, token) for token in event.tokens]
        self._finish = event.finish or self._finish
        bodies = self._said(event.text) if event.text else []
        if event.calls:
            # What calls are made of is no text, and has no entries.
            self._pending = []
            bodies += self._message_closed("completed")
            for call in event.calls:
                bodies += self._called(call)
        return bodies

    def _closed(self, event: Closed) -> list[dict[str, Any]]:
        cut = self._finish == "length"
        status = "incomplete" if cut else "completed"
        self._extra["usage"] = _usage(event)
        if event.explanation is not None:
            self._extra["loramux"] = {**self._extra["loramux"], "explain": event.explanation}
        if cut:
            self._extra["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self._extra["completed_at"] = int(time.time())
        bodies: list[dict[str, Any]] = []
        if self._pending and (self._message is not None or not self._output):
            bodies += self._said("")
        elif self._message is None and not self._output:
            bodies += self._message_opened()
        bodies += self._message_closed(status)
        return [*bodies, self._event(f"response.{status}", response=self._response(status))]

    def _said(self, text: str) -> list[dict[str, Any]]:
        """More of the message, which is opened by its first text."""
        bodies = self._message_opened() if self._message is None else []
        assert self._message is not None
        entries, self._pending = self._pending, []
        self._message.text.append(text)
        self._message.entries += entries
        return [*bodies, self._part("response.output_text.delta", delta=text, logprobs=entries)]

    def _message_opened(self) -> list[dict[str, Any]]:
        index = len(self._output)
        self._message = _Message(f"msg_{self.serial}_{index}", index)
        item = output_message(self._message.id, "in_progress", [])
        return [
            self._event("response.output_item.added", output_index=index, item=item),
            self._part("response.content_part.added", part=output_text("", [])),
        ]

    def _message_closed(self, status: str) -> list[dict[str, Any]]:
        if self._message is None:
            return []
        index, item = self._message.index, self._message.body(status)
        part = item["content"][0]
        bodies = [
            self._part("response.output_text.done", text=part["text"], logprobs=part["logprobs"]),
            self._part("response.content_part.done", part=part),
            self._event("response.output_item.done", output_index=index, item=item),
        ]
        self._output.append(item)
        self._message = None
        return bodies

    def _called(self, call: ToolCall) -> list[dict[str, Any]]:
        """A call, whole as it comes, by the events of one that grows."""
        index = len(self._output)
        id = f"fc_{self.serial}_{index}"
        item = output_call(id, "completed", call, call.arguments)
        self._output.append(item)
        begun = output_call(id, "in_progress", call, "")
        arguments, at = call.arguments, {"item_id": id, "output_index": index}
        return [
            self._event("response.output_item.added", output_index=index, item=begun),
            self._event("response.function_call_arguments.delta", **at, delta=arguments),
            self._event("response.function_call_arguments.done", **at, name=call.name, arguments=arguments),
            self._event("response.output_item.done", output_index=index, item=item),
        ]

    def _response(self, status: str, *said: dict[str, Any], **extra: Any) -> dict[str, Any]:
        """The response with the items that are whole, and what has been `said` of the next."""
        return response_body(
            self.request,
            f"resp_{self.serial}",
            self.created,
            status=status,
            output=[*self._output, *said],
            **self._extra,
            **extra,
        )

    def _part(self, kind: str, **fields: Any) -> dict[str, Any]:
        """An event about the part of the message."""
        assert self._message is not None
        place = {"output_index": self._message.index, "content_index": 0}
        return self._event(kind, item_id=self._message.id, **place, **fields)

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
