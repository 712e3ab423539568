"""Blends as adapters that backends have loaded: written once, loaded where they are used, and
pinned meanwhile."""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256

from loramux.adapters.blend import Blend
from loramux.adapters.errors import BlendError
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.materialise import materialise
from loramux.adapters.quiet_threads import QuietThreads
from loramux.adapters.residency import Lease, ResidencyStats
from loramux.server.backend.errors import BackendDown, BackendError
from loramux.server.backend.fleet import Fleet, Member
from loramux.server.backend.folders import PREFIX, BlendFolders, Written
from loramux.server.backend.protocol import AdapterBackend
from loramux.server.backend.room import Room

log = logging.getLogger("loramux")

_FIXED_BYTES = 64 * 2**10


@dataclass(eq=False)
class _Entry:
    blend: Blend
    name: str
    pins: int = 0
    making: asyncio.Task[Written] | None = None


class LoadedBlend:
    """The handle of a lease: the blend on whichever backend a sequence goes to."""

    def __init__(self, residency: "RemoteResidency", entry: _Entry) -> None:
        self._residency = residency
        self._entry = entry

    @property
    def key(self) -> str:
        return self._entry.name

    async def mixture(self, member: Member[AdapterBackend]) -> Mapping[str, object]:
        """The fields of a request to that backend, where the blend is loaded from then on.

        Raises:
            BackendError, BlendError: it cannot be loaded there.
        """
        await self._residency.load(self._entry, member)
        return {"model": self._entry.name}


class RemoteResidency:
    """Leases blends over a fleet. Used on the event loop; merging and the disk have a thread of their own."""

    def __init__(
        self,
        experts: Mapping[str, LoraAdapter],
        fleet: Fleet[AdapterBackend],
        folders: BlendFolders,
        room: Room,
        *,
        base: str,
    ) -> None:
        self._experts = dict(experts)
        self._fleet = fleet
        self._folders = folders
        self._room = room
        self._base = base
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._writing = QuietThreads("loramux-blend")
        self._clearing = asyncio.Lock()
        self._released = asyncio.Event()
        self._hits = self._misses = self._evictions = 0

    @property
    def experts(self) -> Mapping[str, LoraAdapter]:
        """Every expert of the pool by id."""
        return self._experts

    @asynccontextmanager
    async def lease(self, blend: Blend) -> AsyncIterator[Lease]:
        """Have a blend on the disk and on a backend, and keep it there until the context ends.

        Raises:
            BlendError: it cannot be formed, is too wide, or names an expert that is gone.
            BackendError: no backend takes it.
        """
        if blend.is_bare:
            yield Lease(blend.key, blend.method, None, 0, 0.0, True, 0.0)
            return
        started = time.monotonic()
        entry = self._entry(blend)
        entry.pins += 1
        try:
            loads = self._loads
            written = await self._written(entry)
            await self._placed(entry)
            cached = self._loads == loads
            self._hits += cached
            self._misses += not cached
            yield Lease(
                blend.key,
                written.method,
                LoadedBlend(self, entry),
                written.rank,
                written.relative_error,
                cached,
                0.0 if cached else time.monotonic() - started,
            )
        finally:
            self._unpin(entry)

    async def load(self, entry: _Entry, member: Member[AdapterBackend]) -> None:
        """Have a pinned blend on a backend; nothing happens if it is there."""
        await self._fleet.known(member)
        if entry.name in member.loaded:
            member.loaded[entry.name] = member.loaded.pop(entry.name)
            return
        async with member.changing:
            while entry.name not in member.loaded:
                await self._fleet.known(member)  # it may have been lost while others were waited for
                await self._written(entry)
                if await self._make_room(member):
                    path = self._folders.path_there(entry.name)
                    try:
                        await member.server.load(entry.name, path)
                    except BackendDown as error:
                        member.lost(str(error))
                        raise
                    member.loaded[entry.name] = path
                    member.loads += 1

    def add_expert(self, expert: LoraAdapter) -> None:
        """Serve one more expert.

        Raises:
            BlendError: the id is taken, or its rank is more than the backends take.
        """
        if expert.id in self._experts:
            raise BlendError(f"an expert with the id {expert.id!r} is loaded already; unload it first")
        self._room.refuse(expert)
        self._experts[expert.id] = expert

    def remove_expert(self, expert_id: str) -> None:
        """Serve an expert no more; requests that run keep it. Its blends go when others need the room.

        Raises:
            BlendError: there is no such expert.
        """
        if self._experts.pop(expert_id, None) is None:
            raise BlendError(f"there is no expert {expert_id!r}")

    def stats(self) -> ResidencyStats:
        folders = self._folders
        present = set(folders.names())
        return ResidencyStats(
            capacity_bytes=self._room.nbytes,
            used_bytes=folders.nbytes,
            pinned_bytes=sum(folders.size(name) for name in self._entries if name in present),
            host_bytes=sum(expert.nbytes for expert in self._experts.values()),
            blends=len(present),
            resident_experts=(),
            room=self._room.adapters,
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
        )

    # A blend's way to the disk

    def _entry(self, blend: Blend) -> _Entry:
        name = self._name(blend)
        entry = self._entries.get(name)
        if entry is None:
            entry = self._entries[name] = _Entry(blend, name)
        return entry

    def _name(self, blend: Blend) -> str:
        """The digest of all that the files depend on; what a name stands for never changes."""
        room = self._room
        described = f"{blend.key} {room.ranks} {room.truncate} {self._base}"
        return PREFIX + sha256(described.encode()).hexdigest()[:32]

    def _unpin(self, entry: _Entry) -> None:
        entry.pins -= 1
        if not entry.pins:
            self._entries.pop(entry.name, None)
            self._released.set()

    async def _written(self, entry: _Entry) -> Written:
        """The blend on the disk; concurrent callers write it once."""
        found = self._folders.find(entry.name)
        if found is not None:
            return found
        if entry.making is None:
            entry.pins += 1
            entry.making = asyncio.create_task(self._write(entry))
            entry.making.add_done_callback(lambda task: task.cancelled() or task.exception())
        # Shielded: one client that leaves must not undo what others wait for.
        return await asyncio.shield(entry.making)

    async def _write(self, entry: _Entry) -> Written:
        try:
            parts = entry.blend.weighted(self._experts)
            made = await self._writing.run(
                partial(materialise, entry.blend, parts, self._room.ranks, truncate=self._room.truncate)
            )
            facts = Written(made.method, made.rank, made.relative_error, 0)
            await self._clear(made.adapter.nbytes + _FIXED_BYTES)
            run = self._writing.run
            written = await run(self._folders.write, entry.name, made.adapter, facts, self._base)
            self._folders.add(entry.name, written)
            return written
        except OSError as error:
            raise BackendError(f"backend.folder {self._folders.root}: {error.strerror or error}") from None
        finally:
            entry.making = None
            self._unpin(entry)

    async def _clear(self, wanted: int) -> None:
        """Delete the directories that were used least lately until there is room for so many bytes."""
        limit = self._room.nbytes
        if wanted > limit:
            raise BlendError(f"the blend takes {wanted} bytes on the disk, backend.bytes is {limit}")
        async with self._clearing:
            while self._folders.nbytes + wanted > limit:
                self._released.clear()
                victim = next((name for name in self._folders.names() if name not in self._entries), None)
                if victim is None:
                    await self._released.wait()
                    continue
                for member in self._fleet.members:
                    await self._unload(member, victim)
                if victim not in self._entries:
                    self._folders.forget(victim)
                    self._evictions += 1
                    await self._writing.run(self._folders.erase, victim)

    # And to a backend

    @property
    def _loads(self) -> int:
        return sum(member.loads for member in self._fleet.members)

    async def _placed(self, entry: _Entry) -> None:
        """The blend on the first backend that takes it.

        Raises:
            BackendError: on none.
        """
        problems: list[BackendError] = []
        for member in self._fleet.order(entry.name):
            try:
                await self.load(entry, member)
            except BackendError as error:
                problems.append(error)
                continue
            return
        raise self._fleet.none_left(problems)

    async def _make_room(self, member: Member[AdapterBackend]) -> bool:
        """Unload until one more fits; false where something was waited for, so that all has to be looked at
        again."""
        self._released.clear()
        if len(member.loaded) < self._room.adapters:
            return True
        victim = next((n for n in member.loaded if n.startswith(PREFIX) and n not in self._entries), None)
        if victim is not None:
            await self._unload(member, victim)
            return True
        if not any(name in self._entries for name in member.loaded):
            raise BackendError(
                f"backend {member.url}: its {len(member.loaded)} adapters are not loramux's and leave no "
                "room; unload some, or raise --max-cpu-loras and backend.max_cpu_loras"
            )
        await self._released.wait()
        return False

    async def _unload(self, member: Member[AdapterBackend], name: str) -> None:
        if member.loaded.pop(name, None) is None:
            return
        try:
            await member.server.unload(name)
        except BackendError as error:
            log.warning("%s", error)
