"""How a request's events become its answer, streamed or whole."""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from loramux.server.events import Closed, Delta, Event, Opened, ScoredToken
from loramux.server.render.envelope import Body, Envelope, Events, headers, usage
from loramux.server.text.tool_calls import ToolCall
from loramux.server.text.vocabulary import Vocabulary


@dataclass(slots=True)
class WholeChoice:
    """One choice, put together."""

    text: list[str] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    finish: str | None = None


@dataclass(slots=True)
class Renderer(ABC):
    """Renders one request's events; a subclass knows what a choice looks like."""

    envelope: Envelope
    vocabulary: Vocabulary
    _: KW_ONLY
    logprobs: bool

    async def chunks(self, events: Events) -> AsyncGenerator[Body]:
        """One body an event; the first has the `loramux` object and no text, a last one what is explained."""
        first: dict[str, str] = {}
        opened: dict[str, Any] = {}
        so_far = Closed(0, 0, 0)
        async with aclosing(events) as items:
            async for event in items:
                counts: dict[str, Any] = {}
                if self.envelope.continuous_usage:
                    so_far = _counted(so_far, event)
                    counts["usage"] = usage(so_far)
                match event:
                    case Opened():
                        first, opened = headers(event), event.body()
                        opening = self.next_choices(Delta(0))
                        yield self.envelope.chunk(opening, loramux=opened, **counts), first
                    case Delta() if (
                        event.text or event.finish or event.calls or (event.tokens and self.logprobs)
                    ):
                        for choice in self.next_choices(event):
                            yield self.envelope.chunk([choice], **counts), first
                    case Closed() if self.envelope.usage or event.explanation is not None:
                        last: dict[str, Any] = {"usage": usage(event)} if self.envelope.usage else {}
                        if event.explanation is not None:
                            last["loramux"] = {**opened, "explain": event.explanation}
                        yield self.envelope.chunk([], **last), first

    async def whole(self, events: Events) -> Body:
        """The same events, folded into one answer."""
        choices: dict[int, WholeChoice] = {}
        extra: dict[str, Any] = {}
        first: dict[str, str] = {}
        async with aclosing(events) as items:
            async for event in items:
                match event:
                    case Opened():
                        first = headers(event)
                        extra["loramux"] = event.body()
                    case Delta():
                        whole = choices.setdefault(event.index, WholeChoice())
                        whole.text.append(event.text)
                        whole.entries += self.entries(event)
                        whole.calls += event.calls
                        whole.finish = event.finish or whole.finish
                    case Closed():
                        extra["usage"] = usage(event)
                        if event.explanation is not None:
                            extra["loramux"]["explain"] = event.explanation
        bodies = [self.whole_choice(index, whole) for index, whole in sorted(choices.items())]
        return self.envelope.body(bodies, **extra), first

    def entries(self, delta: Delta) -> list[dict[str, Any]]:
        """The log-probability entries of a delta; none unless asked for."""
        return [self.entry(token) for token in delta.tokens] if self.logprobs else []

    @abstractmethod
    def entry(self, token: ScoredToken) -> dict[str, Any]:
        """One log-probability entry."""

    @abstractmethod
    def next_choices(self, delta: Delta) -> list[dict[str, Any]]:
        """The choices of the next chunks, of which most deltas make one. Called once for each delta, in their
        order."""

    @abstractmethod
    def whole_choice(self, index: int, choice: WholeChoice) -> dict[str, Any]:
        """One choice of the whole answer."""


def _counted(so_far: Closed, event: Event) -> Closed:
    """The counts after an event."""
    match event:
        case Opened():
            return replace(so_far, prompt_tokens=event.prompt_tokens)
        case Delta(echo=False):
            return replace(so_far, completion_tokens=so_far.completion_tokens + len(event.tokens))
    return so_far
