"""Which blends are on the device: merged once, pinned while in use, evicted by age when others need the
room."""

import asyncio
import os
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch

from loramux.adapters.arena import Arena
from loramux.adapters.blend import Blend
from loramux.adapters.errors import BlendError
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.merge import Merged, Parts, merge
from loramux.adapters.quiet_threads import QuietThreads
from loramux.kernels.gated_lora.gate_slot import Extent, GateSlot
from loramux.kernels.gated_lora.plan import Slot


class BlendTooLarge(BlendError):
    """The blend needs more rows than the arena has, however empty it is."""


@dataclass(frozen=True, slots=True)
class Handle:
    """What a lease gives to the engine: the rows and gate to apply, and the key that tells KV caches
    apart."""

    key: str
    slot: Slot


@dataclass(frozen=True, slots=True)
class Lease:
    """A blend made resident and pinned. `handle` is a `Handle`, or what stands for one in another process;
    `None` for the bare base. `seconds` is what merging took."""

    key: str
    method: str
    handle: Any
    rank: int
    relative_error: float
    cached: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class ResidencyStats:
    """A snapshot for `/metrics`; counters only grow. `room`: experts of the largest rank that fit at once;
    `moved_bytes`: of rows that were copied to the device for leases."""

    capacity_bytes: int
    used_bytes: int
    pinned_bytes: int
    host_bytes: int
    blends: int
    resident_experts: tuple[str, ...]
    room: int
    hits: int
    misses: int
    evictions: int
    moved_bytes: int = 0


@dataclass(eq=False)
class _Resident:
    """An adapter on the device: an expert, or the result of an inexact merge.

    `ready` is done when its rows are filled; `None` if they were before anybody could ask. `blends`: the keys
    of those that stand on it.
    """

    key: str
    adapter: LoraAdapter
    is_expert: bool
    extents: tuple[Extent, ...]
    ready: asyncio.Future[None] | None
    pins: int = 0
    blends: set[str] = field(default_factory=set)

    @property
    def is_broken(self) -> bool:
        return self.ready is not None and (not self.ready.done() or self.ready.exception() is not None)


class _Source(NamedTuple):
    """An adapter that a blend needs resident, under which key, and with what factor on its rows."""

    key: str
    adapter: LoraAdapter
    gate: float
    is_expert: bool


@dataclass(eq=False)
class _Entry:
    """A blend and the residents it stands on. It holds one pin on each while it has pins of its own."""

    blend: Blend
    pins: int = 0
    residents: list[_Resident] = field(default_factory=list)
    handle: Handle | None = None
    rank: int = 0
    relative_error: float = 0.0
    seconds: float = 0.0
    task: asyncio.Task[None] | None = None


class Residency:
    """Leases blends over one arena.

    An exact blend is a rank concatenation by reference: its experts' rows stay where they are and its gate
    carries the weights, so two blends share the experts they have in common and a new mixture of resident
    experts copies nothing. The result of an inexact merge has rows of its own. Everything but the merging and
    copying itself happens on the event loop.
    """

    def __init__(self, experts: Mapping[str, LoraAdapter], arena: Arena, *, max_blends: int = 1024) -> None:
        self._experts = dict(experts)
        self._contents = Counter(expert.content_hash for expert in experts.values())
        self._arena = arena
        self._max_blends = max_blends
        self._residents: OrderedDict[str, _Resident] = OrderedDict()
        self._blends: OrderedDict[str, _Entry] = OrderedDict()
        self._allocating = asyncio.Lock()
        self._released = asyncio.Event()
        self._copying = QuietThreads("loramux-copy")
        self._merging = QuietThreads("loramux-merge", count=max(1, (os.cpu_count() or 1) // 4))
        self._hits = self._misses = self._evictions = self._moved_rows = 0

    @property
    def experts(self) -> Mapping[str, LoraAdapter]:
        """The host tier: every expert of the pool by id, in a type that may be narrower than the rows'."""
        return self._experts

    @asynccontextmanager
    async def lease(self, blend: Blend) -> AsyncIterator[Lease]:
        """Make a blend resident and hold it there until the context ends.

        Concurrent leases of one blend merge it once. When other leases hold the room it needs, this waits.

        Raises:
            BlendTooLarge: it could never fit.
            BlendError: it names an expert that the pool does not have (any more), or the merge refused it.
        """
        if blend.is_bare:
            yield Lease(blend.key, blend.method, None, 0, 0.0, True, 0.0)
            return
        entry = self._blends.get(blend.key)
        cached = entry is not None and entry.handle is not None
        self._hits += cached
        self._misses += not cached
        if entry is None:
            entry = self._blends[blend.key] = _Entry(blend)
            self._pin(entry)
            entry.task = asyncio.create_task(self._make_resident(entry))
            entry.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._blends.move_to_end(blend.key)
        self._pin(entry)
        try:
            if entry.handle is None and entry.task is not None:
                # Shielded: one client that leaves must not undo the merge that others wait for.
                await asyncio.shield(entry.task)
            took = 0.0 if cached else entry.seconds
            yield Lease(blend.key, blend.method, entry.handle, entry.rank, entry.relative_error, cached, took)
        finally:
            self._unpin(entry)

    def preload(self) -> int:
        """Copy in the experts that there is room for, in the order of the pool, before anything is leased;
        returns how many are resident."""
        fitting: dict[str, LoraAdapter] = {}
        free = self._arena.free_rows
        for expert in self._experts.values():
            content, rank = expert.content_hash, expert.max_rank
            if content not in self._residents and content not in fitting and rank <= free:
                fitting[content], free = expert, free - rank
        # In their rows they lie as blends name them: parts that are neighbours are read in one go.
        places = {content: self._arena.allocate(fitting[content].max_rank) for content in sorted(fitting)}
        for content, expert in fitting.items():
            self._arena.write(expert, places[content])
            self._residents[content] = _Resident(content, expert, True, places[content], None)
        return len(self._residents)

    def add_expert(self, expert: LoraAdapter) -> None:
        """Put an expert into the host tier.

        Raises:
            BlendError: the id is taken.
            BlendTooLarge: it would never fit, however empty the arena is.
        """
        if expert.id in self._experts:
            raise BlendError(f"an expert with the id {expert.id!r} is loaded already; unload it first")
        if expert.max_rank > self._arena.rows:
            unit = self._arena.bytes_per_row
            raise BlendTooLarge(
                f"expert {expert.id!r} has rank {expert.max_rank} and needs as many rows of adapter memory "
                f"({expert.max_rank * unit} bytes), there are {self._arena.rows}; start the server with "
                f"residency.rows at least {expert.max_rank} (and residency.bytes at least as large)"
            )
        self._experts[expert.id] = expert
        self._contents[expert.content_hash] += 1

    def remove_expert(self, expert_id: str) -> None:
        """Take an expert out: running requests keep it, new ones no longer find it, its rows go when unused.

        Raises:
            BlendError: there is no such expert.
        """
        expert = self._experts.pop(expert_id, None)
        if expert is None:
            raise BlendError(f"there is no expert {expert_id!r}")
        self._contents -= Counter([expert.content_hash])
        self._drop_orphans([self._residents.get(expert.content_hash)])

    def stats(self) -> ResidencyStats:
        unit = self._arena.bytes_per_row
        pinned = sum(_rows(r.extents) for r in self._residents.values() if r.pins)
        return ResidencyStats(
            capacity_bytes=self._arena.rows * unit,
            used_bytes=(self._arena.rows - self._arena.free_rows) * unit,
            pinned_bytes=pinned * unit,
            host_bytes=sum(expert.nbytes for expert in self._experts.values()),
            blends=len(self._blends),
            resident_experts=tuple(e.id for e in self._experts.values() if e.content_hash in self._residents),
            room=self._arena.rows // max((e.max_rank for e in self._experts.values()), default=1),
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
            moved_bytes=self._moved_rows * unit,
        )

    def check_integrity(self) -> None:
        """Recount rows and pins.

        Raises:
            RuntimeError: a row is lost or counted twice, or a pin is off.
        """
        used = sum(_rows(r.extents) for r in self._residents.values())
        if used + self._arena.free_rows != self._arena.rows:
            raise RuntimeError(f"{used} rows in use and {self._arena.free_rows} free of {self._arena.rows}")
        for key, resident in self._residents.items():
            pins = sum(e.pins > 0 and resident in e.residents for e in self._blends.values())
            if pins != resident.pins:
                raise RuntimeError(f"resident {key} has {resident.pins} pins, {pins} blends hold it")

    # Making a blend resident

    async def _make_resident(self, entry: _Entry) -> None:
        started = time.monotonic()
        try:
            sources = await self._sources(entry)
            await self._reserve(entry, sources)
            for resident in entry.residents:
                if resident.ready is not None:
                    await resident.ready
            gates = [
                torch.full((_rows(resident.extents),), source.gate)
                for resident, source in zip(entry.residents, sources, strict=True)
            ]
            slot = GateSlot(
                extents=tuple(extent for resident in entry.residents for extent in resident.extents),
                gate=torch.cat(gates),
                modules=frozenset(module for r in entry.residents for module in r.adapter.pairs),
                contents=tuple(resident.key for resident in entry.residents for _ in resident.extents),
            )
            entry.seconds = time.monotonic() - started
            entry.handle = Handle(entry.blend.key, slot)
        finally:
            if entry.handle is None and self._blends.get(entry.blend.key) is entry:
                self._forget(entry)
            self._unpin(entry)
            self._limit_blends()

    async def _sources(self, entry: _Entry) -> list[_Source]:
        """The adapters whose rows make the blend; merges them first where the method is not exact."""
        blend = entry.blend
        parts = blend.weighted(self._experts)
        if blend.method == "exact":
            entry.rank = sum(expert.max_rank for expert, _ in parts)
            return [_Source(expert.content_hash, expert, weight, True) for expert, weight in parts]
        merged = await self._merging.run(self._merge, parts, blend)
        entry.rank, entry.relative_error = merged.rank, merged.relative_error
        return [_Source(blend.key, merged.adapter, 1.0, False)]

    def _merge(self, parts: Parts, blend: Blend) -> Merged:
        """In a type no narrower than the rows', for the result of a merge is in the type of its parts."""
        rows = self._arena.dtype
        parts = [(one.to(torch.promote_types(one.dtype, rows)), weight) for one, weight in parts]
        return merge(parts, blend.method, rank=blend.rank, density=blend.density, seed=blend.seed or 0)

    async def _reserve(self, entry: _Entry, sources: list[_Source]) -> None:
        """Pin what is resident, find room for the rest, and copy it in."""
        needed = sum(source.adapter.max_rank for source in sources)
        if needed > self._arena.rows:
            unit = self._arena.bytes_per_row
            raise BlendTooLarge(
                f"the blend needs {needed} rows ({needed * unit} bytes) of adapter memory, "
                f"there are {self._arena.rows} ({self._arena.rows * unit} bytes)"
            )
        fresh: list[tuple[_Resident, asyncio.Future[None]]] = []
        async with self._allocating:  # one at a time, in order: two half-served blends would wait for ever
            for source in sources:
                if (resident := self._residents.get(source.key)) is not None:
                    self._residents.move_to_end(source.key)
                    self._hold(entry, resident)
            for source in sources:
                if source.key not in self._residents:
                    fresh.append(await self._allocate(source))
                    self._hold(entry, fresh[-1][0])
        order = {source.key: i for i, source in enumerate(sources)}
        entry.residents.sort(key=lambda resident: order[resident.key])
        for resident, ready in fresh:
            try:
                await self._copying.run(self._arena.write, resident.adapter, resident.extents)
                self._moved_rows += _rows(resident.extents)
                ready.set_result(None)
            finally:
                if not ready.done():
                    ready.set_exception(BlendError(f"copying {resident.adapter.id!r} in failed"))

    def _hold(self, entry: _Entry, resident: _Resident) -> None:
        entry.residents.append(resident)
        resident.pins += 1
        resident.blends.add(entry.blend.key)

    async def _allocate(self, source: _Source) -> tuple[_Resident, asyncio.Future[None]]:
        rows = source.adapter.max_rank
        while self._arena.free_rows < rows:
            victim = next((key for key, resident in self._residents.items() if not resident.pins), None)
            if victim is not None:
                self._evict(victim)
                self._evictions += 1
            else:
                self._released.clear()
                await self._released.wait()
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        resident = _Resident(source.key, source.adapter, source.is_expert, self._arena.allocate(rows), ready)
        self._residents[source.key] = resident
        return resident, ready

    # Letting go

    def _pin(self, entry: _Entry) -> None:
        if not entry.pins:
            for resident in entry.residents:
                resident.pins += 1
                self._residents.move_to_end(resident.key)
        entry.pins += 1

    def _unpin(self, entry: _Entry) -> None:
        entry.pins -= 1
        if entry.pins:
            return
        for resident in entry.residents:
            resident.pins -= 1
        self._drop_orphans(entry.residents)
        self._released.set()

    def _evict(self, key: str) -> None:
        """Free an unpinned resident's rows and forget the blends that stand on it."""
        resident = self._residents.pop(key)
        for blend_key in tuple(resident.blends):
            entry = self._blends.get(blend_key)
            if entry is not None and resident in entry.residents:
                self._forget(entry)
        self._arena.free(resident.extents)

    def _forget(self, entry: _Entry) -> None:
        """Know a blend no longer; a new lease of it starts anew."""
        del self._blends[entry.blend.key]
        for resident in entry.residents:
            resident.blends.discard(entry.blend.key)

    def _drop_orphans(self, residents: Iterable[_Resident | None]) -> None:
        """Free, of these, what nobody can ask for any more: removed experts, merges without a blend, failed
        copies. Every request passes here, so that nothing may depend on how many experts there are."""
        for resident in tuple(residents):
            if resident is None or resident.pins or self._residents.get(resident.key) is not resident:
                continue
            known = self._contents if resident.is_expert else self._blends
            if resident.is_broken or resident.key not in known:
                self._evict(resident.key)

    def _limit_blends(self) -> None:
        excess = max(0, len(self._blends) - self._max_blends)
        oldest = islice((entry for entry in self._blends.values() if not entry.pins), excess)
        for entry in tuple(oldest):
            self._forget(entry)
            self._drop_orphans(entry.residents)


def _rows(extents: tuple[Extent, ...]) -> int:
    return sum(hi - lo for lo, hi in extents)
