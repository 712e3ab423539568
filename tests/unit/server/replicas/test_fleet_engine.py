"""Sequences over replicas that are full, that close, that are lost: what goes on, and what does not."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import pytest

from loramux.server.engine.protocol import (
    EngineClosed,
    EngineError,
    EngineOverloaded,
    Event,
    Finished,
    PromptScored,
    Sampling,
    Started,
    Token,
    TokenScore,
    Work,
)
from loramux.server.replicas.engine import FleetEngine
from loramux.server.replicas.placement import Affinity, Shadow, Wish
from loramux.server.replicas.replica import Lost

Script = Callable[[Work], Sequence[Event | Exception]]


class Site:
    """A replica that says what it is told to, once a script."""

    def __init__(self, number: int, *scripts: Script) -> None:
        self.number = number
        self.load = 0
        self.open = True
        self.shadow = Shadow(8)
        self.works: list[Work] = []
        self._scripts = list(scripts)

    async def run(self, work: Work, lease: int | None) -> AsyncGenerator[Event, None]:
        assert lease is None
        self.works.append(work)
        for event in self._scripts.pop(0)(work):
            if isinstance(event, Lost):
                self.open = not event.died
            if isinstance(event, Exception):
                raise event
            yield event


class Sites:
    """What the engine asks of a fleet."""

    max_context = 99

    def __init__(self, *sites: Site) -> None:
        self.sites = sites
        self.experts: dict[str, Any] = {}
        self.moves: list[int] = []

    @property
    def open(self) -> list[Site]:
        return [site for site in self.sites if site.open]

    async def choose(self, wish: Wish, but: frozenset[Site] = frozenset()) -> Site:
        found = [site for site in self.open if site not in but]
        if not found:
            raise EngineClosed("no replica is running")
        return min(Affinity().order(found, wish), key=lambda site: site.number)

    def moved(self, lost: Lost) -> None:
        self.moves.append(lost.number)


def says(*tokens: int, then: Exception | None = None) -> Script:
    """The tokens of `tokens` that are still to come, and an end."""

    def script(work: Work) -> list[Event | Exception]:
        rest = tokens[len(work.answered or ()) :]
        end: Event | Exception = Finished("length") if then is None else then
        return [Started(3), *(Token(TokenScore(token)) for token in rest), end]

    return script


def ask(sites: Sites, **fields: Any) -> list[Event]:
    engine = FleetEngine(sites)  # type: ignore[arg-type]
    work = Work("w", (1, 2), Sampling(max_tokens=9), **fields)

    async def run() -> list[Event]:
        return [event async for event in engine.run(work)]

    return asyncio.run(run())


def tokens(events: list[Event]) -> list[int]:
    return [event.score.id for event in events if isinstance(event, Token)]


def test_it_goes_on_after_its_tokens_with_one_seed() -> None:
    first = Site(0, says(5, 6, then=Lost(0, died=True)))
    second = Site(1, says(5, 6, 7, then=Lost(1, died=False)), says(5, 6, 7, 8))
    sites = Sites(first, second)
    events = ask(sites)
    assert tokens(events) == [5, 6, 7, 8]
    assert [type(event) for event in events].count(Started) == 1
    assert isinstance(events[-1], Finished)
    works = [*first.works, *second.works]
    assert [work.answered for work in works] == [None, (5, 6), (5, 6, 7)]
    assert len({work.sampling.seed for work in works}) == 1
    assert works[0].sampling.seed is not None
    assert sites.moves == [0, 1]


def test_a_prompt_is_scored_once() -> None:
    scored = PromptScored((TokenScore(1), TokenScore(2, -1.0)))

    def lost(_: Work) -> list[Event | Exception]:
        return [Started(), scored, Lost(0, died=True)]

    second = Site(1, says(5))
    events = ask(Sites(Site(0, lost), second), prompt_logprobs=0)
    assert [event for event in events if isinstance(event, PromptScored)] == [scored]
    assert second.works[0].prompt_logprobs is None
    assert second.works[0].answered == ()


def test_a_full_queue_sends_it_on_and_three_send_it_back() -> None:
    full = [Site(n, lambda _, n=n: [EngineOverloaded(7, 9 - n)]) for n in range(3)]
    free = Site(3, says(5))
    with pytest.raises(EngineOverloaded) as refused:
        ask(Sites(*full, free))
    assert refused.value.retry_after == 7
    assert free.works == []
    again = Site(0, lambda _: [EngineOverloaded(7, 2)])
    second = Site(1, says(5))
    assert tokens(ask(Sites(again, second))) == [5]
    assert second.works[0].answered is None  # it has no place yet
    with pytest.raises(EngineOverloaded):
        ask(Sites(Site(0, lambda _: [EngineOverloaded(7, 2)])))


def test_one_that_was_taken_in_after_another_refused_may_go_to_that_one_when_it_is_lost() -> None:
    first = Site(0, lambda _: [EngineOverloaded(7, 2)], says(5, 6))
    second = Site(1, says(5, then=Lost(1, died=True)))
    assert tokens(ask(Sites(first, second))) == [5, 6]
    assert first.works[1].answered == (5,)


def test_one_that_closes_is_left() -> None:
    closing = Site(0, lambda _: [EngineClosed("ending")])
    assert tokens(ask(Sites(closing, Site(1, says(5))))) == [5]
    assert not closing.open


def test_what_may_kill_replicas_is_not_tried_for_ever() -> None:
    sites = Sites(*(Site(n, lambda _, n=n: [Started(), Lost(n, died=True)]) for n in range(5)))
    with pytest.raises(EngineError, match="3 replicas were lost"):
        ask(sites)
    assert len(sites.open) == 2
    long = Sites(
        *(Site(n, says(*range(n + 1), then=Lost(n, died=True))) for n in range(5)), Site(5, says(*range(6)))
    )
    assert tokens(ask(long)) == list(range(6))
