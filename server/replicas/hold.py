"""A request's mixture, held resident at the replica where its sequences are, and at the next one if that is
lost."""

import asyncio
from collections.abc import Mapping
from typing import Protocol

from loramux.adapters.lora import LoraAdapter
from loramux.adapters.residency import Lease
from loramux.server.engine.protocol import EngineError
from loramux.server.leases import Mixture
from loramux.server.replicas.placement import Wish
from loramux.server.replicas.replica import Lost, Replica

#: A request that sees so many replicas die under it without a token in between may be why they do.
MAX_DEATHS = 3


class Chooser(Protocol):
    """What is asked of a fleet."""

    @property
    def experts(self) -> Mapping[str, LoraAdapter]: ...
    async def choose(self, wish: Wish, but: frozenset[Replica], /) -> Replica: ...


class Hold:
    """What the engine gets as the handle of a lease; without a mixture it is the bare base.

    All sequences of a request go to one replica. Before the first of them does, the request counts there as
    one, so that those that come at once do not all see the same idle replica.
    """

    def __init__(self, fleet: Chooser, mixture: Mixture | None) -> None:
        self.mixture = mixture
        self.wish = Wish.of(mixture, fleet.experts)
        self._fleet = fleet
        self._at: Replica | None = None
        self._claimed: Replica | None = None
        self._leases: dict[Replica, tuple[int, asyncio.Task[Lease]]] = {}

    async def first(self) -> Lease:
        """Have it resident somewhere.

        Raises:
            BlendError: as `Leases.lease`. EngineClosed: there is no replica.
            EngineError: replica after replica was lost.
        """
        deaths = 0
        while True:
            replica = await self.place()
            self._claimed = replica
            replica.load += 1
            try:
                lease = await self._on(replica)
            except Lost as lost:
                deaths += lost.died
                if deaths == MAX_DEATHS:
                    raise EngineError(f"{deaths} replicas were lost while they worked on this") from None
                self.unclaim()
            else:
                assert lease is not None  # a bare base is held by nobody
                return lease

    async def place(self, but: frozenset[Replica] = frozenset()) -> Replica:
        """Where its next sequence goes: where the others are, if that takes work and is none of those that
        are full.

        Raises:
            EngineClosed: there is no replica.
        """
        if self._at is None or not self._at.open or self._at in but:
            self._at = await self._fleet.choose(self.wish, but)
        return self._at

    async def on(self, replica: Replica) -> int | None:
        """The number of its lease there, which is taken if need be; none for the bare base.

        Raises:
            Lost: the replica went away. BlendError: as `Leases.lease`.
        """
        await self._on(replica)
        return None if self.mixture is None else self._leases[replica][0]

    def unclaim(self) -> None:
        """It no longer counts as a sequence to come."""
        if self._claimed is not None:
            self._claimed.load -= 1
            self._claimed = None

    def close(self) -> None:
        """The request is over."""
        self.unclaim()
        for replica, (number, task) in self._leases.items():
            task.cancel()
            replica.release(number)
        self._leases.clear()

    async def _on(self, replica: Replica) -> Lease | None:
        if self.mixture is None:
            return None
        if replica not in self._leases:
            number = replica.new_id()
            task = asyncio.create_task(replica.lease(number, self.mixture))
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
            self._leases[replica] = number, task
        # Shielded: one sequence that ends must not undo what the others wait for.
        lease = await asyncio.shield(self._leases[replica][1])
        replica.shadow.leased(self.wish)
        return lease
