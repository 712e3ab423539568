"""The engine of an edge: sequences run at replicas, and go on at another one when theirs is lost."""

import logging
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from loramux.server.engine.course import Course
from loramux.server.engine.protocol import (
    EngineClosed,
    EngineError,
    EngineOverloaded,
    EngineStats,
    Event,
    Finished,
    Work,
)
from loramux.server.replicas.fleet import Fleet
from loramux.server.replicas.hold import MAX_DEATHS, Hold
from loramux.server.replicas.replica import Lost, Replica

log = logging.getLogger("loramux")

#: Where a new sequence is tried: at home, and at two others if that is full.
MAX_TRIES = 3


class FleetEngine:
    """Implements `Engine` over the replicas of a fleet.

    A draw depends on the seed and on how many tokens came before it, penalties and the place in a grammar on
    the tokens themselves: so prompt, tokens and seed are the whole state of a sequence. One without a seed
    gets one here, and goes on as a seeded one does.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    @property
    def max_context(self) -> int:
        return self._fleet.max_context

    async def start(self) -> None:
        await self._fleet.start()

    async def stop(self, timeout: float) -> None:
        await self._fleet.stop(timeout)

    def stats(self) -> EngineStats:
        return self._fleet.totals.engine()

    async def run(self, work: Work) -> AsyncGenerator[Event, None]:
        hold = work.adapter if isinstance(work.adapter, Hold) else Hold(self._fleet, None)
        course = Course(_seeded(work))
        full: dict[Replica, EngineOverloaded] = {}
        deaths = 0
        try:
            while True:
                replica = await hold.place(frozenset(full))
                known = len(course.answered)
                try:
                    lease = await hold.on(replica)
                    hold.unclaim()
                    async with aclosing(replica.run(course.next(), lease)) as events:
                        course.sent = True
                        async for event in events:
                            if course.take(event):
                                yield event
                            if isinstance(event, Finished):
                                return
                except EngineOverloaded as refusal:
                    course.sent = False
                    full[replica] = refusal
                    if len(full) == MAX_TRIES or full.keys() >= set(self._fleet.open):
                        raise min(full.values(), key=lambda one: one.retry_after) from None
                except EngineClosed:  # it is ending, and will be gone in a moment
                    replica.open = False
                    full.clear()
                except Lost as lost:
                    self._fleet.moved(lost)
                    full.clear()  # it has its place in a queue
                    deaths = deaths + 1 if lost.died and len(course.answered) == known else 0
                    if deaths == MAX_DEATHS:
                        raise EngineError(f"{deaths} replicas were lost while they worked on this") from None
        finally:
            if hold is not work.adapter:
                hold.close()


def _seeded(work: Work) -> Work:
    """Without its adapter, which is the hold's, and with a seed."""
    sampling = work.sampling
    if sampling.seed is None:
        sampling = replace(sampling, seed=secrets.randbits(63))
    return replace(work, adapter=None, sampling=sampling)
