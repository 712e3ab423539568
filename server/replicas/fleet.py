"""The replicas of an edge: started, watched, started again, and all with the same pool."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial

from loramux.adapters.lora import LoraAdapter
from loramux.adapters.residency import Lease
from loramux.adapters.sparse.shelf import SparseCard
from loramux.server.engine.protocol import EngineClosed
from loramux.server.errors import StartError
from loramux.server.leases import Mixture
from loramux.server.replica_metrics import ReplicaStats
from loramux.server.replicas.changes import Changes, PoolsDiffer
from loramux.server.replicas.frames import Message
from loramux.server.replicas.hold import Hold
from loramux.server.replicas.life import Life
from loramux.server.replicas.outline import card_of, outlined
from loramux.server.replicas.placement import Affinity, Shadow, Wish
from loramux.server.replicas.process import Process
from loramux.server.replicas.replica import Lost, Replica
from loramux.server.replicas.totals import Totals
from loramux.server.settings import Settings

log = logging.getLogger("loramux")

#: How long a request waits for a replica while there is none.
PATIENCE_SECONDS = 120.0
#: Between tries to start a replica that does not come up, doubled each time.
FIRST_PAUSE, LAST_PAUSE = 1.0, 30.0
#: When none is left and each was tried so often, a supervisor has to do something.
MAX_FAILURES = 5
#: Within this time an edge hears of a signal that all processes of its service get.
TOLD_SECONDS = 0.25
#: A replica that leaves has so long to end; what ran there has moved before.
LEAVE_SECONDS = 5.0


class Fleet:
    """Used from one event loop.

    Attributes:
        experts, cards: what requests may ask for, by id; the replicas may hold more.
        draining: whether the edge itself is about to end.
        changes: how the pool comes to be another one.
    """

    def __init__(
        self,
        settings: Settings,
        first: Sequence[tuple[Life, Message]],
        *,
        affinity: Affinity | None = None,
        launch: Callable[..., Life] = Process.launch,
    ) -> None:
        """`first` are the replicas with what they said at their start; they hold the same pool."""
        self.size = len(first)
        hello = first[0][1]
        self.max_context: int = hello["max_context"]
        self.experts: dict[str, LoraAdapter] = {one.id: one for one in outlined(hello["experts"])}
        self.cards: dict[str, SparseCard] = {card["id"]: card_of(card) for card in hello["sparse"]}
        self.changes = Changes(self.experts, self.cards, lambda: self.open)
        self.totals = Totals(lambda: [replica.stats for replica in self.replicas.values()])
        self.replicas: dict[int, Replica] = {}
        self._affinity = affinity or Affinity()
        self._launch = partial(launch, settings, replicas=self.size, among=1)
        self._first = list(first)
        # One each: that one does not come up must not keep others of the edge's threads waiting.
        self._waiting = ThreadPoolExecutor(self.size, "replica")
        self._restarts = [0] * self.size
        self._moved = [0] * self.size
        self._buried_bytes = [0.0] * self.size
        self._failures = [0] * self.size
        self._joined = asyncio.Event()
        self._keeping: list[asyncio.Task[None]] = []
        self._stopping = False
        self.draining: Callable[[], bool] = lambda: False

    @property
    def open(self) -> list[Replica]:
        """Those that take work."""
        return [replica for replica in self.replicas.values() if replica.open]

    async def start(self) -> None:
        """Connect to all of them, and keep them from then on."""
        for life, hello in self._first:
            await self._join(life, hello)
        self._keeping = [asyncio.create_task(self._keep(number)) for number in list(self.replicas)]

    async def stop(self, timeout: float) -> None:
        """End all of them; what still runs fails."""
        self._stopping = True
        self._joined.set()
        if not self.replicas:
            for life, _ in self._first:
                life.end()
        replicas = list(self.replicas.values())
        for replica in replicas:
            replica.let_go(timeout)
        await asyncio.gather(*(replica.ended(timeout + LEAVE_SECONDS) for replica in replicas))
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        self._waiting.shutdown(wait=False)

    async def choose(self, wish: Wish, but: frozenset[Replica] = frozenset(), /) -> Replica:
        """The replica for a request, none of `but`; where there is none, this waits for one.

        Raises:
            EngineClosed: none has come for a long time, or the edge is shutting down.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_SECONDS):
                while True:
                    if self._stopping:
                        raise EngineClosed("the server is shutting down")
                    if found := [replica for replica in self.open if replica not in but]:
                        return self._affinity.order(found, wish)[0]
                    self._joined.clear()
                    await self._joined.wait()
        raise EngineClosed(self.totals.dead or "no replica is running")

    @asynccontextmanager
    async def lease(self, mixture: Mixture) -> AsyncIterator[Lease]:
        """Hold a mixture at a replica until the context ends.

        Raises:
            BlendError: as `Leases.lease`. EngineClosed: there is no replica.
        """
        hold = Hold(self, mixture)
        with self.changes.using(mixture):
            try:
                yield replace(await hold.first(), handle=hold)
            finally:
                hold.close()

    def moved(self, lost: Lost) -> None:
        """A sequence has to go on elsewhere."""
        self._moved[lost.number] += 1

    def stats(self) -> list[ReplicaStats]:
        """Of every number."""
        found = []
        for number in range(self.size):
            replica = self.replicas.get(number)
            stats: Mapping[str, Mapping[str, float]] = {} if replica is None else replica.stats
            found.append(
                ReplicaStats(
                    number,
                    replica is not None and replica.open,
                    replica.pid if replica is not None and replica.open else None,
                    0 if replica is None else replica.load,
                    self._restarts[number],
                    self._moved[number],
                    self._buried_bytes[number] + (stats["residency"]["moved_bytes"] if stats else 0),
                )
            )
        return found

    async def drain(self, number: int) -> bool:
        """Have a replica's work go on elsewhere, end it and start it again; False if it takes no work, or if
        no other one does."""
        replica = self.replicas.get(number)
        if replica is None or not replica.open or len(self.open) < 2:
            return False
        await self._send_away(replica)
        return True

    async def _send_away(self, replica: Replica) -> None:
        log.info("replica %d: its %d sequences move, then it ends", replica.number, replica.load)
        replica.send_away()
        self._note_stall()
        replica.stop(0)
        await replica.ended(LEAVE_SECONDS)

    # One number's life after life

    async def _keep(self, number: int) -> None:
        while True:
            replica = self.replicas[number]
            await self._watch(replica)
            if self._stopping:
                return
            code = await self._bury(replica)
            log.warning("replica %d has ended (%s); it is started again", number, code)
            self._restarts[number] += 1
            await self._raise(number)

    async def _watch(self, replica: Replica) -> None:
        """Until it is gone. One that was told to end has its work moved, if need be to the next under its
        number."""
        gone = asyncio.create_task(replica.gone.wait())
        left = asyncio.create_task(replica.left.wait())
        try:
            await asyncio.wait((gone, left), return_when=asyncio.FIRST_COMPLETED)
            if not gone.done():
                # Where every process of the service was told, the edge is about to drain: that is no move.
                await asyncio.wait((gone,), timeout=TOLD_SECONDS)
                # One that stays where nothing else runs does best to go on until it is ended.
                nowhere = replica.stays and len(self.open) < 2
                if not gone.done() and not nowhere and not self.draining():
                    await self._send_away(replica)
            await gone
        finally:
            gone.cancel()
            left.cancel()

    async def _bury(self, replica: Replica) -> str:
        self._note_stall()
        await replica.ended(LEAVE_SECONDS)
        self.totals.bury(replica.stats)
        if replica.stats:
            self._buried_bytes[replica.number] += replica.stats["residency"]["moved_bytes"]
        replica.stats = {}
        return replica.ending

    async def _raise(self, number: int) -> None:
        """Start it until it is there."""
        pause = FIRST_PAUSE
        while True:
            loop = asyncio.get_running_loop()
            life = await loop.run_in_executor(self._waiting, self._launch, number)
            try:
                hello = await loop.run_in_executor(self._waiting, life.hello)
                await self._join(life, hello)
            except (StartError, PoolsDiffer, Lost) as error:
                life.kill()
                await asyncio.to_thread(life.end)
                self._failures[number] += 1
                log.error("replica %d does not come up: %s", number, error)
                if not self.open and all(count >= MAX_FAILURES for count in self._failures):
                    self.totals.dead = f"no replica could be started again: {error}"
                    self._joined.set()
            except BaseException:
                life.kill()
                raise
            else:
                self._failures[number] = 0
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE)

    async def _join(self, life: Life, hello: Message) -> None:
        """Take a replica in, after it has been given the pool as it is now."""
        ranks = {one.content_hash: one.max_rank for one in outlined(hello["experts"])}
        resident = [(content, ranks[content]) for content in hello["resident"]]
        replica = Replica(life, hello, Shadow(hello["rows"], resident))
        await replica.attach()
        async with self.changes.applied_to(replica):
            self.replicas[life.number] = replica
            replica.open = True
        self._note_stall()
        self._joined.set()

    def _note_stall(self) -> None:
        self.totals.stalled = None if self.open else "no replica is running; one is being started"
