"""One sequence inside the engine: what it still needs, and where its events go."""

import asyncio
from dataclasses import dataclass, field

from loramux.adapters.residency import Handle
from loramux.server.engine.protocol import (
    EngineError,
    Event,
    Finished,
    PromptScored,
    Started,
    Token,
    TokenScore,
    Work,
)
from loramux.server.engine.sampler import Sampler


@dataclass(eq=False)
class Running:
    """Written by the stepping thread only, read by the event loop through the events it delivers."""

    work: Work
    stop_ids: frozenset[int]
    loop: asyncio.AbstractEventLoop
    sampler: Sampler = field(init=False)
    events: asyncio.Queue[Event | EngineError] = field(default_factory=asyncio.Queue)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    generated: int = 0
    started: bool = False
    finished: bool = False
    prompt_scores: list[TokenScore] = field(default_factory=list)

    handle: Handle | None = field(init=False)

    def __post_init__(self) -> None:
        handle = self.work.adapter
        if handle is not None and not isinstance(handle, Handle):
            raise EngineError(f"the adapter handle is a {type(handle).__name__}, not one of a residency")
        self.handle = handle
        self.sampler = Sampler(self.work.sampling, self.work.prompt)

    @property
    def needs_prompt_scores(self) -> bool:
        return self.work.prompt_logprobs is not None and len(self.prompt_scores) < len(self.work.prompt)

    def start(self, cached_tokens: int) -> list[Event]:
        """The first step that includes this sequence is about to run."""
        if self.started:
            return []
        self.started = True
        if self.needs_prompt_scores:
            self.prompt_scores.append(TokenScore(self.work.prompt[0]))
        return [Started(cached_tokens)]

    def accept(self, score: TokenScore) -> list[Event]:
        """Take the token that a step has chosen; the events it causes, `Finished` last if it ends here."""
        events: list[Event] = []
        sampling = self.work.sampling
        if self.work.prompt_logprobs is not None and self.generated == 0:
            events.append(PromptScored(tuple(self.prompt_scores)))
        if sampling.max_tokens == 0:
            self.finished = True
            return [*events, Finished("length")]
        if score.id in self.stop_ids:
            self.finished = True
            return [*events, Finished("stop", score.id, score)]
        self.generated += 1
        self.sampler.accept(score.id)
        events.append(Token(score))
        if self.generated >= sampling.max_tokens:
            self.finished = True
            events.append(Finished("length"))
        return events
