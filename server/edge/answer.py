"""Answers that end the work behind them when the client leaves: one JSON body, or server-sent events."""

import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loramux.server.edge.disconnect import ClientGone, while_connected
from loramux.server.edge.failures import ErrorAnswer, describe
from loramux.server.wire.strict import encode_json

log = logging.getLogger("loramux")

EXPERTS_HEADER = "x-loramux-experts"


class JsonAnswer(Response):
    """JSON that is there already."""

    def __init__(self, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(encode_json(body), media_type="application/json", headers=headers)


class WorkedAnswer(Response):
    """JSON that `work` returns, with the headers it wants."""

    def __init__(self, work: Coroutine[Any, Any, tuple[Mapping[str, Any], Mapping[str, str]]]) -> None:
        super().__init__()
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body, headers = await while_connected(receive, self._work)
        except ClientGone:
            return
        await JsonAnswer(body, headers)(scope, receive, send)


class StreamedAnswer(Response):
    """Server-sent events from a generator of JSON objects.

    Headers go out with the first object, so that whatever fails before it still has its own status. A failure
    after it becomes an error event, and the stream ends without `[DONE]`.
    """

    def __init__(self, events: AsyncGenerator[tuple[Mapping[str, Any], Mapping[str, str]]]) -> None:
        super().__init__()
        self._events = events

    def event(self, body: Mapping[str, Any]) -> bytes:
        """One object as an event."""
        return b"data: " + encode_json(body) + b"\n\n"

    def failure(self, answer: ErrorAnswer) -> bytes:
        """The last event of a stream that failed."""
        return b"data: " + answer.encode() + b"\n\n"

    def end(self) -> bytes:
        """The last event of one that did not."""
        return b"data: [DONE]\n\n"

    async def __call__(
        self,
        scope: Scope,  # noqa: ARG002
        receive: Receive,
        send: Send,
    ) -> None:
        try:
            await while_connected(receive, self._pump(send))
        except ClientGone:
            return

    async def _pump(self, send: Send) -> None:
        started = False
        try:
            async with aclosing(self._events) as events:
                async for body, headers in events:
                    if not started:
                        await _start(send, headers)
                        started = True
                    await _chunk(send, self.event(body))
        except Exception as error:
            if not started:
                raise
            answer = describe(error)
            if answer.status == 500:
                log.error("a stream failed after its first byte", exc_info=error)
            await _chunk(send, self.failure(answer), more=False)
        else:
            await _chunk(send, self.end(), more=False)


class NamedEvents(StreamedAnswer):
    """Events with their `type` as name, and no word after the last. `failed` makes one of a failure."""

    def __init__(
        self,
        events: AsyncGenerator[tuple[Mapping[str, Any], Mapping[str, str]]],
        failed: Callable[[ErrorAnswer], Mapping[str, Any]],
    ) -> None:
        super().__init__(events)
        self._failed = failed

    def event(self, body: Mapping[str, Any]) -> bytes:
        return f"event: {body['type']}\n".encode() + super().event(body)

    def failure(self, answer: ErrorAnswer) -> bytes:
        return self.event(self._failed(answer))

    def end(self) -> bytes:
        return b""


async def _start(send: Send, extra: Mapping[str, str]) -> None:
    headers = MutableHeaders(
        {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
        }
    )
    headers.update(extra)
    await send({"type": "http.response.start", "status": 200, "headers": headers.raw})


async def _chunk(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
