"""One sequence inside the engine: what it still needs, and where its events go."""

import asyncio
import secrets
from collections import Counter
from dataclasses import dataclass, field

from llguidance import LLMatcher

from loramux.adapters.residency import Handle
from loramux.kernels.gated_lora import Slot
from loramux.server.engine.grammars import one_line
from loramux.server.engine.protocol import (
    EngineError,
    Event,
    Finished,
    GrammarError,
    PromptScored,
    Started,
    Token,
    TokenScore,
    Work,
)


@dataclass(eq=False)
class Sequence:
    """Written by the stepping thread only, read by the event loop through the events it delivers.

    Attributes:
        tokens: prompt and answer so far.
        computed: how many of them have their keys and values in the cache.
        pages: where these are, in order; hashes: of those pages that are full.
        matcher: where the answer is in the grammar it must follow, if there is one. It goes with `tokens`
            alone: a sequence that is computed again is where it was.
        counts: how often each token is part of the answer.
        gone: no later step can include it.
    """

    work: Work
    stop_ids: frozenset[int]
    loop: asyncio.AbstractEventLoop
    matcher: LLMatcher | None = None
    events: asyncio.Queue[Event | EngineError] = field(default_factory=asyncio.Queue)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    started: bool = False
    finished: bool = False
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)

    tokens: list[int] = field(init=False)
    seed: int = field(init=False)
    handle: Handle | None = field(init=False)

    def __post_init__(self) -> None:
        handle = self.work.adapter
        if handle is not None and not isinstance(handle, Handle):
            raise EngineError(f"the adapter handle is a {type(handle).__name__}, not one of a residency")
        self.handle = handle
        answered = self.work.answered or ()
        self.tokens = [*self.work.prompt, *answered]
        self.counts.update(answered)
        seed = self.work.sampling.seed
        self.seed = secrets.randbits(63) if seed is None else seed

    @property
    def slot(self) -> Slot | None:
        return None if self.handle is None else self.handle.slot

    @property
    def root(self) -> bytes:
        """What tells its pages apart from those of others with the same tokens."""
        return b"" if self.handle is None else self.handle.key.encode()

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.work.prompt)

    @property
    def needs_prompt_scores(self) -> bool:
        return self.work.prompt_logprobs is not None and len(self.prompt_scores) < len(self.work.prompt)

    def resume(self) -> Finished | None:
        """Go to where the grammar is after the tokens that the answer has already; its end, if they reach it.

        Raises:
            GrammarError: they do not follow the grammar.
        """
        for token in self.work.answered or ():
            if problem := self.follow(token):
                raise GrammarError(problem)
        if self.generated and self.matcher is not None and self.matcher.is_stopped():
            return Finished("stop")
        return Finished("length") if self.generated >= max(1, self.work.sampling.max_tokens) else None

    def start(self, cached_tokens: int) -> list[Event]:
        """The first step that includes this sequence is about to run."""
        if self.started:
            return []
        self.started = True
        if self.needs_prompt_scores:
            self.prompt_scores.append(TokenScore(self.work.prompt[0]))
        return [Started(cached_tokens)]

    @property
    def is_constrained(self) -> bool:
        """Whether the next token has to be one that the grammar allows."""
        return self.matcher is not None and self.work.sampling.max_tokens > 0

    def follow(self, token: int) -> str | None:
        """Go on in the grammar by the token that a step has chosen; what is wrong where that is impossible.

        To be called before `accept`; without a grammar, and for a token that ends the answer, there is
        nothing to do.
        """
        if self.matcher is None or not self.is_constrained:
            return None
        # A matcher that hit a limit allows its end in place of the tokens it could not find.
        if not self.matcher.is_error() and (token in self.stop_ids or self.matcher.consume_token(token)):
            return None
        return f"no token follows the grammar: {one_line(self.matcher.get_error())}"

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
        self.tokens.append(score.id)
        self.counts[score.id] += 1
        events.append(Token(score))
        if self.matcher is not None and self.matcher.is_stopped():
            self.finished = True
            events.append(Finished("stop"))
        elif self.generated >= sampling.max_tokens:
            self.finished = True
            events.append(Finished("length"))
        return events
