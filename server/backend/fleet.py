"""The backends together: which of them a blend goes to, and whether each is what it has to be."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Generic, TypeVar

from loramux.server.backend.errors import BackendDown, BackendError
from loramux.server.backend.protocol import Backend, BackendFacts

log = logging.getLogger("loramux")

#: A blend stays with its backend until that has so many more sequences than the one with the fewest.
PATIENCE = 8

Server = TypeVar("Server", bound=Backend)


@dataclass(eq=False)
class Member(Generic[Server]):
    """One backend, and what is known of it.

    Attributes:
        loaded: the adapters that it has by their names, least recently used first.
        running: our sequences on it.
        down: why it cannot be used, until it answers again.
        loads: adapters loaded there; `repairs`: of these, such as it had forgotten.
        changing: held while its adapters change.
    """

    server: Server
    loaded: dict[str, str] = field(default_factory=dict)
    facts: BackendFacts | None = None
    running: int = 0
    down: str | None = None
    loads: int = 0
    repairs: int = 0
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _knowing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def url(self) -> str:
        return self.server.url

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around one sequence."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    def lost(self, reason: str) -> None:
        """It cannot be reached, or was started anew: nothing that was known of it holds any more."""
        if self.down is None:
            log.warning("%s", reason)
        self.down = reason
        self.facts = None
        self.loaded.clear()


class Fleet(Generic[Server]):
    """Servers of one kind, which hold the same base.

    Args:
        inspect: asks a server what it is, and raises `BackendError` where that is not what it has to be;
            called before its first use, and again after it was lost.
    """

    def __init__(
        self, servers: Sequence[Server], inspect: Callable[[Server], Awaitable[BackendFacts]]
    ) -> None:
        self.members = [Member(server) for server in servers]
        self._inspect = inspect

    async def open(self) -> None:
        """Connect."""
        for member in self.members:
            await member.server.open()

    async def close(self) -> None:
        for member in self.members:
            await member.server.close()

    async def known(self, member: Member[Server]) -> BackendFacts:
        """What a member is, asked and checked if that is not known.

        Raises:
            BackendDown: it does not answer.
            BackendError: it is not what it has to be.
        """
        async with member._knowing:
            if member.facts is None:
                try:
                    facts = await self._inspect(member.server)
                except BackendError as error:
                    member.lost(str(error))
                    raise
                if member.down is not None:
                    log.info("backend %s answers again", member.url)
                member.facts, member.down = facts, None
                member.loaded = dict(facts.adapters)
            return member.facts

    def order(self, key: str | None) -> list[Member[Server]]:
        """Where a blend should go, the best first; `None` is the bare base, at home everywhere.

        Its home is found by rendezvous hashing, so that a backend that comes or goes moves only its own
        share. One that is busier than the least busy by `PATIENCE` sequences gives way to the next.
        """
        if key is None:
            return sorted(self.members, key=lambda one: (one.down is not None, one.running))
        ranked = sorted(self.members, key=lambda one: sha256(f"{key} {one.url}".encode()).digest())
        least = min((one.running for one in ranked if one.down is None), default=0)
        return sorted(ranked, key=lambda one: (one.down is not None, one.running >= least + PATIENCE))

    def none_left(self, problems: Sequence[BackendError]) -> BackendError:
        """The error when none can be used: what is wrong with one of them, or that all are down."""
        wrong = [error for error in problems if not isinstance(error, BackendDown)]
        return wrong[0] if wrong else BackendDown("; ".join(map(str, problems)))

    def stalled(self) -> str | None:
        """What is wrong with each, where none can be used now."""
        reasons = [member.down for member in self.members if member.down is not None]
        if len(reasons) < len(self.members):
            return None
        return f"no backend can be used: {'; '.join(reasons)}"

    async def look(self, member: Member[Server]) -> None:
        """Ask one that is down whether it is back, and any other whether it is still there."""
        if member.down is not None:
            with suppress(BackendError):
                await self.known(member)
            return
        try:
            await member.server.alive()
        except BackendDown as error:
            member.lost(str(error))
        except BackendError:
            pass  # it answers
