"""The engine as others run it: each sequence goes to a backend, and its stream comes back."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Generic, Protocol, TypeVar

from loramux.adapters.errors import BlendError
from loramux.server.backend.errors import BackendDown, BackendError, BlendForgotten
from loramux.server.backend.fleet import Fleet, Member
from loramux.server.backend.protocol import Backend
from loramux.server.engine.course import Course
from loramux.server.engine.protocol import (
    EngineClosed,
    EngineOverloaded,
    EngineStats,
    Event,
    Finished,
    Token,
    Work,
)

Server = TypeVar("Server", bound=Backend)


class RemoteHandle(Protocol[Server]):
    """What a lease gives to this engine."""

    @property
    def key(self) -> str: ...

    async def mixture(self, member: Member[Server]) -> Mapping[str, object]: ...


class RemoteEngine(Generic[Server]):
    """Implements `Engine` over a fleet.

    A sequence that fails before its first token, because its backend is gone or has forgotten the blend, is
    sent again: to the same one after loading the blend anew, or to the next. One that breaks off later goes
    on at the next, where its backend can take the tokens so far as a part of the prompt.

    Args:
        handles: the kind of handle that the residency gives out.
        max_context: tokens of prompt and answer that every backend takes.
        most: sequences under way at once; one more is `EngineOverloaded`.
        patience: seconds between two looks at a backend.
    """

    def __init__(
        self,
        fleet: Fleet[Server],
        handles: type[RemoteHandle[Server]],
        *,
        max_context: int,
        most: int,
        patience: float = 5.0,
    ) -> None:
        self._fleet = fleet
        self._handles = handles
        self._max_context = max_context
        self._most = most
        self._patience = patience
        self._looking: list[asyncio.Task[None]] = []
        self._open = False
        self._running = self._waiting = self._prefill = self._decoded = self._cached = 0

    @property
    def max_context(self) -> int:
        return self._max_context

    async def start(self) -> None:
        """Connect. Backends are asked what they are when they are used.

        Raises:
            BackendError: none of them can be used.
        """
        await self._fleet.open()
        problems = []
        for member in self._fleet.members:
            try:
                await self._fleet.known(member)
            except BackendError as error:
                problems.append(error)
        if len(problems) == len(self._fleet.members):
            await self._fleet.close()
            raise problems[0]
        self._open = True
        self._looking = [asyncio.create_task(self._look_after(member)) for member in self._fleet.members]

    async def stop(self, timeout: float) -> None:  # noqa: ARG002
        """End. Whatever still runs finds its connection closed; the pipeline has waited before."""
        self._open = False
        for task in self._looking:
            task.cancel()
        if self._looking:
            await asyncio.wait(self._looking)
        await self._fleet.close()

    async def run(self, work: Work) -> AsyncGenerator[Event, None]:
        if not self._open:
            raise EngineClosed("the engine is not running")
        if self._running + self._waiting >= self._most:
            raise EngineOverloaded(self._waiting)
        handle = work.adapter
        if handle is not None and not isinstance(handle, self._handles):
            raise BlendError(
                "what was asked for is computed inside the base, which no backend allows; serve it without "
                "--backend"
            )
        begun = False
        self._waiting += 1
        try:
            async with aclosing(self._attempts(work, handle)) as events:
                async for event in events:
                    if not begun:
                        begun = True
                        self._waiting, self._running = self._waiting - 1, self._running + 1
                        self._prefill += len(work.prompt)
                    self._decoded += isinstance(event, Token)
                    self._cached += event.cached_tokens if isinstance(event, Finished) else 0
                    yield event
        finally:
            if begun:
                self._running -= 1
            else:
                self._waiting -= 1

    def stats(self) -> EngineStats:
        return EngineStats(
            running=self._running,
            waiting=self._waiting,
            prefill_tokens=self._prefill,
            decode_tokens=self._decoded,
            prefix_hit_tokens=self._cached,
            stalled=self._fleet.stalled(),
        )

    async def _attempts(self, work: Work, handle: RemoteHandle[Server] | None) -> AsyncGenerator[Event]:
        course = Course(work)
        problems: list[BackendError] = []
        for member in self._fleet.order(None if handle is None else handle.key):
            for last in (False, True):
                with member.working():
                    try:
                        mixture = await self._prepared(handle, member)
                    except BackendError as error:
                        problems.append(error)
                        break
                    try:
                        async with aclosing(member.server.stream(course.next(), mixture)) as events:
                            async for event in events:
                                course.sent = True
                                if course.take(event):
                                    yield event
                        return
                    except (BackendDown, BlendForgotten) as error:
                        member.lost(str(error))
                        if not self._open or (course.answered and not member.server.can_resume(work)):
                            raise
                        if last or isinstance(error, BackendDown):
                            problems.append(error)
                            break
                        member.repairs += 1
        raise self._fleet.none_left(problems)

    async def _prepared(
        self, handle: RemoteHandle[Server] | None, member: Member[Server]
    ) -> Mapping[str, object]:
        """The member is what it has to be, and has the blend."""
        await self._fleet.known(member)
        return {} if handle is None else await handle.mixture(member)

    async def _look_after(self, member: Member[Server]) -> None:
        """One that comes back gets its share again, also while others do without it; one that is gone is
        missed before a request has to find out."""
        while True:
            await asyncio.sleep(self._patience)
            await self._fleet.look(member)
