"""Completions answers."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from loramux.server.events import Closed, Delta, Opened
from loramux.server.render.envelope import Body, Envelope, Events, fold, headers, usage
from loramux.server.text.scores import completion_entry
from loramux.server.text.vocabulary import Vocabulary
from loramux.server.wire.completions import completion_choice, completion_logprobs


class CompletionRenderer:
    """Renders one request's events."""

    def __init__(self, envelope: Envelope, vocabulary: Vocabulary, *, logprobs: bool) -> None:
        self._envelope = envelope
        self._vocabulary = vocabulary
        self._logprobs = logprobs

    async def chunks(self, events: Events) -> AsyncGenerator[Body]:
        """One body an event; the first has the `loramux` object and no text."""
        offsets: dict[int, int] = {}
        first: dict[str, str] = {}
        async with aclosing(events) as items:
            async for event in items:
                match event:
                    case Opened():
                        first = headers(event)
                        choice = completion_choice(0, text="", logprobs=None, finish_reason=None)
                        yield self._envelope.chunk([choice], loramux=event.body()), first
                    case Delta() if event.text or event.finish or (event.tokens and self._logprobs):
                        offset = offsets.get(event.index, 0)
                        yield self._envelope.chunk([self._chunk_choice(event, offset)]), first
                        offsets[event.index] = offset + _length(event)
                    case Delta():
                        offsets[event.index] = offsets.get(event.index, 0) + _length(event)
                    case Closed() if self._envelope.usage:
                        yield self._envelope.chunk([], usage=usage(event)), first

    async def whole(self, events: Events) -> Body:
        """The same events, folded into one answer."""
        folded = await fold(events, self._entries)
        choices = [
            completion_choice(
                index,
                text="".join(choice.text),
                logprobs=completion_logprobs(choice.entries, 0) if self._logprobs else None,
                finish_reason=choice.finish,
            )
            for index, choice in sorted(folded.choices.items())
        ]
        return self._envelope.body(choices, **folded.extra), folded.headers

    def _chunk_choice(self, delta: Delta, offset: int) -> dict[str, Any]:
        entries = self._entries(delta)
        return completion_choice(
            delta.index,
            text=delta.text,
            logprobs=completion_logprobs(entries, offset) if entries else None,
            finish_reason=delta.finish,
        )

    def _entries(self, delta: Delta) -> list[dict[str, Any]]:
        return [completion_entry(self._vocabulary, token) for token in delta.tokens] if self._logprobs else []


def _length(delta: Delta) -> int:
    """How far the choice's text has grown, counting what a stop scanner may still hold back."""
    return sum(len(token.text) for token in delta.tokens) if delta.tokens else len(delta.text)
