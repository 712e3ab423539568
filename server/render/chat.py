"""Chat answers."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from loramux.server.events import Closed, Delta, Opened
from loramux.server.render.envelope import Body, Envelope, Events, fold, headers, usage
from loramux.server.text.scores import chat_entry
from loramux.server.text.vocabulary import Vocabulary
from loramux.server.wire.chat import chat_choice, chat_chunk_choice, chat_logprobs


class ChatRenderer:
    """Renders one request's events."""

    def __init__(self, envelope: Envelope, vocabulary: Vocabulary, *, logprobs: bool) -> None:
        self._envelope = envelope
        self._vocabulary = vocabulary
        self._logprobs = logprobs

    async def chunks(self, events: Events) -> AsyncGenerator[Body]:
        """One body an event; the first has the `loramux` object, the role and no text."""
        spoken: set[int] = set()
        first: dict[str, str] = {}
        async with aclosing(events) as items:
            async for event in items:
                match event:
                    case Opened():
                        first = headers(event)
                        spoken.add(0)
                        choice = chat_chunk_choice(0, text="", first=True, logprobs=None, finish_reason=None)
                        yield self._envelope.chunk([choice], loramux=event.body()), first
                    case Delta():
                        silent = not event.text and not event.finish and not (event.tokens and self._logprobs)
                        if not silent:
                            yield (
                                self._envelope.chunk([self._chunk_choice(event, event.index not in spoken)]),
                                first,
                            )
                            spoken.add(event.index)
                    case Closed() if self._envelope.usage:
                        yield self._envelope.chunk([], usage=usage(event)), first

    async def whole(self, events: Events) -> Body:
        """The same events, folded into one answer."""
        folded = await fold(events, self._entries)
        choices = [
            chat_choice(
                index,
                text="".join(choice.text),
                logprobs=chat_logprobs(choice.entries) if self._logprobs else None,
                finish_reason=choice.finish,
            )
            for index, choice in sorted(folded.choices.items())
        ]
        return self._envelope.body(choices, **folded.extra), folded.headers

    def _chunk_choice(self, delta: Delta, first: bool) -> dict[str, Any]:
        entries = self._entries(delta)
        return chat_chunk_choice(
            delta.index,
            text=delta.text if delta.text or not delta.finish else None,
            first=first,
            logprobs=chat_logprobs(entries) if entries else None,
            finish_reason=delta.finish,
        )

    def _entries(self, delta: Delta) -> list[dict[str, Any]]:
        return [chat_entry(self._vocabulary, token) for token in delta.tokens] if self._logprobs else []
