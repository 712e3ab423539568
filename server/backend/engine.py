"""The engine as others run it: each sequence goes to a backend, and its stream comes back."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Generic, Protocol, TypeVar

from loramux.adapters.errors import BlendError
from loramux.server.backend.errors import BackendDown, BackendError, BlendForgotten
from loramux.server.backend.fleet import Fleet, Member
from loramux.server.backend.protocol import Backend
from loramux.server.engine.protocol import (
    EngineClosed,
    EngineOverloaded,
    EngineStats,
    Event,
    PromptScored,
    Started,
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
    sent again: to the same one after loading the blend anew, or to the next.

    Args:
        handles: the kind of handle that the residency gives out.
        max_context: tokens of prompt and answer that every backend takes.
        most: sequences under way at once; one more is `EngineOverloaded`.
    """

    def __init__(
        self, fleet: Fleet[Server], handles: type[RemoteHandle[Server]], *, max_context: int, most: int
    ) -> None:
        self._fleet = fleet
        self._handles = handles
        self._max_context = max_context
        self._most = most
        self._open = False
        self._running = self._waiting = self._prefill = self._decoded = 0

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

    async def stop(self, timeout: float) -> None:  # noqa: ARG002
        """End. Whatever still runs finds its connection closed; the pipeline has waited before."""
        self._open = False
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
        )

    async def _attempts(self, work: Work, handle: RemoteHandle[Server] | None) -> AsyncGenerator[Event]:
        said = False
        for member in self._fleet.order(None if handle is None else handle.key):
            for last in (False, True):
                try:
                    async with aclosing(self._attempt(work, handle, member)) as events:
                        async for event in events:
                            said = said or isinstance(event, Started | PromptScored | Token)
                            yield event
                    return
                except BackendDown as error:
                    member.lost(str(error))
                    if said or not self._open:
                        raise
                    break
                except BlendForgotten as error:
                    member.lost(str(error))
                    member.repairs += 1
                    if said or last:
                        raise
        raise self._fleet.down()

    async def _attempt(
        self, work: Work, handle: RemoteHandle[Server] | None, member: Member[Server]
    ) -> AsyncGenerator[Event]:
        with member.working():
            await self._fleet.known(member)
            mixture = {} if handle is None else await handle.mixture(member)
            async with aclosing(member.server.stream(work, mixture)) as events:
                async for event in events:
                    yield event
