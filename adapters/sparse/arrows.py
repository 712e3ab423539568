"""Arrow over the experts of a pool: made ready once for a set of experts, held while requests use it."""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256

from loramux.adapters.errors import BlendError
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.quiet_threads import QuietThreads
from loramux.adapters.residency import Handle, Lease
from loramux.adapters.sparse.allowance import Allowance
from loramux.adapters.sparse.arrow import ArrowExperts

#: Of the softmax over the chosen experts' scores, as in the paper.
TEMPERATURE = 1.0
#: Different (top_k, temperature) of one set of experts whose slots are remembered.
_MAX_SLOTS = 64


@dataclass(frozen=True, eq=False)
class ArrowMixture:
    """Every token chooses its `top_k` among the experts. Build it with `ArrowMixture.of`."""

    experts: tuple[LoraAdapter, ...]
    top_k: int
    temperature: float

    @classmethod
    def of(cls, experts: Iterable[LoraAdapter], *, top_k: int, temperature: float) -> ArrowMixture:
        """The canonical mixture: sorted by content hash, no content twice, `top_k` no more than there are.

        Raises:
            BlendError: no experts, or `top_k` or `temperature` is not positive.
        """
        distinct = {expert.content_hash: expert for expert in experts}
        if not distinct:
            raise BlendError("arrow needs at least one expert")
        if top_k < 1 or not temperature > 0:
            raise BlendError(f"arrow needs a positive top_k and temperature, got {top_k} and {temperature}")
        ordered = tuple(distinct[content] for content in sorted(distinct))
        return cls(ordered, min(top_k, len(ordered)), temperature)

    @property
    def hashes(self) -> tuple[str, ...]:
        """The content hashes of the experts, sorted."""
        return tuple(expert.content_hash for expert in self.experts)

    @cached_property
    def key(self) -> str:
        """32 hex digits: SHA-256 over the experts' contents, `top_k` and `temperature`."""
        described = json.dumps(["arrow", self.hashes, self.top_k, self.temperature])
        return sha256(described.encode()).hexdigest()[:32]


@dataclass(eq=False)
class _Prepared:
    """A set of experts being made ready, or ready, with the slots that were made over it."""

    task: asyncio.Task[ArrowExperts]
    taken: int
    pins: int = 0
    seconds: float = 0.0
    slots: OrderedDict[str, Handle] = field(default_factory=OrderedDict)


class Arrows:
    """Leases arrow mixtures. The set of experts asked for last stays ready; older ones go when unused.

    `prepare` puts the experts' factors and prototypes on the device, within the `allowance`; it is called on
    a quiet thread.
    """

    def __init__(
        self,
        prepare: Callable[[Sequence[LoraAdapter]], ArrowExperts],
        allowance: Allowance | None = None,
    ) -> None:
        self._prepare = prepare
        self._allowance = allowance or Allowance()
        self._sets: OrderedDict[tuple[str, ...], _Prepared] = OrderedDict()
        self._preparing = QuietThreads("loramux-arrow")

    @property
    def nbytes(self) -> int:
        """Bytes on the device of everything that is ready."""
        tasks = [prepared.task for prepared in self._sets.values()]
        ready = [t.result() for t in tasks if t.done() and not t.cancelled() and t.exception() is None]
        return sum(experts.nbytes for experts in ready)

    @asynccontextmanager
    async def lease(self, mixture: ArrowMixture) -> AsyncIterator[Lease]:
        """Hold the experts ready until the context ends; concurrent leases of one set prepare it once.

        Raises:
            BlendError: the experts cannot be routed together, or the allowance is too small for them.
        """
        prepared = self._sets.get(mixture.hashes)
        cached = prepared is not None and prepared.task.done()
        if prepared is None:
            prepared = self._begin(mixture)
        self._sets.move_to_end(mixture.hashes)
        prepared.pins += 1
        try:
            # Shielded: one client that leaves must not undo what others wait for.
            experts = await asyncio.shield(prepared.task)
            handle = self._handle(prepared, mixture, experts)
            rank = sum(expert.max_rank for expert in mixture.experts)
            yield Lease(mixture.key, "arrow", handle, rank, 0.0, cached, 0.0 if cached else prepared.seconds)
        finally:
            prepared.pins -= 1
            self._drop_unused()

    def _begin(self, mixture: ArrowMixture) -> _Prepared:
        self._drop_unused(all_of_them=True)
        taken = prepared_bytes(mixture.experts)
        self._allowance.take(taken, f"arrow over {len(mixture.experts)} experts")
        prepared = _Prepared(asyncio.create_task(self._run(mixture)), taken)
        prepared.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._sets[mixture.hashes] = prepared
        return prepared

    async def _run(self, mixture: ArrowMixture) -> ArrowExperts:
        started = time.monotonic()
        try:
            experts = await self._preparing.run(self._prepare, mixture.experts)
        except BaseException:
            self._drop(mixture.hashes)
            raise
        self._sets[mixture.hashes].seconds = time.monotonic() - started
        return experts

    def _handle(self, prepared: _Prepared, mixture: ArrowMixture, experts: ArrowExperts) -> Handle:
        """One slot for equal mixtures: requests that share it are one piece of work in a step."""
        handle = prepared.slots.get(mixture.key)
        if handle is None:
            handle = Handle(mixture.key, experts.slot(mixture.top_k, mixture.temperature))
            prepared.slots[mixture.key] = handle
            if len(prepared.slots) > _MAX_SLOTS:
                prepared.slots.popitem(last=False)
        prepared.slots.move_to_end(mixture.key)
        return handle

    def _drop_unused(self, *, all_of_them: bool = False) -> None:
        for hashes in list(self._sets)[: None if all_of_them else -1]:
            if not self._sets[hashes].pins:
                self._drop(hashes)

    def _drop(self, hashes: tuple[str, ...]) -> None:
        self._allowance.give(self._sets.pop(hashes).taken)


def prepared_bytes(experts: Sequence[LoraAdapter]) -> int:
    """What a set of experts takes on the device: their factors again, and a float32 prototype a module."""
    prototypes = sum(4 * pair.a.shape[1] for expert in experts for pair in expert.pairs.values())
    return sum(expert.nbytes for expert in experts) + prototypes
