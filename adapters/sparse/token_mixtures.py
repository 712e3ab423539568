"""Mixtures of the pool's experts from which every token chooses: made ready once a set, held while in use."""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from hashlib import sha256

import torch

from loramux.adapters.errors import BlendError
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.quiet_threads import QuietThreads
from loramux.adapters.residency import Handle, Lease
from loramux.adapters.sparse.allowance import Allowance
from loramux.adapters.sparse.token_experts import TokenExperts, check_options

#: Of the softmax over the chosen experts' scores, as in the paper.
TEMPERATURE = 1.0
#: Different (top_k, temperature) of one set of experts whose slots are remembered.
_MAX_SLOTS = 64


class TokenMethod(StrEnum):
    """What a token chooses by: prototypes (`arrow.py`), or how much of it each expert reads (`spectr.py`)."""

    ARROW = "arrow"
    SPECTR = "spectr"


#: A method and the contents of the experts that are made ready for it.
Set = tuple[TokenMethod, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class TokenMixture:
    """Every token chooses its `top_k` among the experts. Build it with `TokenMixture.of`."""

    method: TokenMethod
    experts: tuple[LoraAdapter, ...]
    top_k: int
    temperature: float

    @classmethod
    def of(
        cls, method: TokenMethod, experts: Iterable[LoraAdapter], *, top_k: int, temperature: float
    ) -> TokenMixture:
        """The canonical mixture: sorted by content hash, no content twice, `top_k` no more than there are.

        Raises:
            BlendError: no experts, or `top_k` or `temperature` is not positive.
        """
        distinct = {expert.content_hash: expert for expert in experts}
        if not distinct:
            raise BlendError(f"{method} needs at least one expert")
        check_options(top_k, temperature)
        ordered = tuple(distinct[content] for content in sorted(distinct))
        return cls(method, ordered, min(top_k, len(ordered)), temperature)

    @property
    def hashes(self) -> tuple[str, ...]:
        """The content hashes of the experts, sorted."""
        return tuple(expert.content_hash for expert in self.experts)

    @property
    def set(self) -> Set:
        """What is made ready for it, and for others that differ in `top_k` and `temperature` alone."""
        return self.method, self.hashes

    @cached_property
    def key(self) -> str:
        """32 hex digits: SHA-256 over the method, the experts' contents, `top_k` and `temperature`."""
        described = json.dumps([self.method, self.hashes, self.top_k, self.temperature])
        return sha256(described.encode()).hexdigest()[:32]


@dataclass(eq=False)
class _Prepared:
    """A set of experts being made ready, or ready, with the slots that were made over it."""

    task: asyncio.Task[TokenExperts]
    taken: int
    pins: int = 0
    seconds: float = 0.0
    slots: OrderedDict[str, Handle] = field(default_factory=OrderedDict)


class TokenMixtures:
    """Leases mixtures. Of each method the set of experts asked for last stays ready; older ones go when
    unused, and so does another method's where the allowance is short.

    `prepare` puts the experts on the device as a method needs them, in `dtype` and within the `allowance`; it
    is called on a quiet thread.
    """

    def __init__(
        self,
        prepare: Callable[[TokenMethod, Sequence[LoraAdapter]], TokenExperts],
        allowance: Allowance | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._prepare = prepare
        self._dtype = dtype
        self._allowance = allowance or Allowance()
        self._sets: OrderedDict[Set, _Prepared] = OrderedDict()
        self._preparing = QuietThreads("loramux-tokens")

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes on the device of everything that is ready, by method."""
        found = dict.fromkeys(map(str, TokenMethod), 0)
        for (method, _), prepared in self._sets.items():
            task = prepared.task
            if task.done() and not task.cancelled() and task.exception() is None:
                found[method] += task.result().nbytes
        return found

    @asynccontextmanager
    async def lease(self, mixture: TokenMixture) -> AsyncIterator[Lease]:
        """Hold the experts ready until the context ends; concurrent leases of one set prepare it once.

        Raises:
            BlendError: the experts cannot be routed together, or the allowance is too small for them.
        """
        prepared = self._sets.get(mixture.set)
        cached = prepared is not None and prepared.task.done()
        if prepared is None:
            prepared = self._begin(mixture)
        self._sets.move_to_end(mixture.set)
        prepared.pins += 1
        try:
            # Shielded: one client that leaves must not undo what others wait for.
            experts = await asyncio.shield(prepared.task)
            handle = self._handle(prepared, mixture, experts)
            rank = sum(expert.max_rank for expert in mixture.experts)
            seconds = 0.0 if cached else prepared.seconds
            yield Lease(mixture.key, mixture.method, handle, rank, 0.0, cached, seconds)
        finally:
            prepared.pins -= 1
            self._drop_unused()

    def _begin(self, mixture: TokenMixture) -> _Prepared:
        self._drop_unused(mixture.method)
        taken = prepared_bytes(mixture.method, mixture.experts, self._dtype)
        what = f"{mixture.method} over {len(mixture.experts)} experts"
        if not self._allowance.has(taken):
            self._drop_unused(*TokenMethod)
        self._allowance.take(taken, what)
        prepared = _Prepared(asyncio.create_task(self._run(mixture)), taken)
        prepared.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._sets[mixture.set] = prepared
        return prepared

    async def _run(self, mixture: TokenMixture) -> TokenExperts:
        started = time.monotonic()
        try:
            experts = await self._preparing.run(self._prepare, mixture.method, mixture.experts)
        except BaseException:
            self._drop(mixture.set)
            raise
        self._sets[mixture.set].seconds = time.monotonic() - started
        return experts

    def _handle(self, prepared: _Prepared, mixture: TokenMixture, experts: TokenExperts) -> Handle:
        """One slot for equal mixtures: requests that share it are one piece of work in a step."""
        handle = prepared.slots.get(mixture.key)
        if handle is None:
            handle = Handle(mixture.key, experts.slot(mixture.top_k, mixture.temperature))
            prepared.slots[mixture.key] = handle
            if len(prepared.slots) > _MAX_SLOTS:
                prepared.slots.popitem(last=False)
        prepared.slots.move_to_end(mixture.key)
        return handle

    def _drop_unused(self, *methods: TokenMethod) -> None:
        """Of those methods every set that nobody uses; of the others all but the last."""
        latest = {key[0]: key for key in self._sets if key[0] not in methods}
        for key in list(self._sets):
            if not self._sets[key].pins and latest.get(key[0]) != key:
                self._drop(key)

    def _drop(self, key: Set) -> None:
        self._allowance.give(self._sets.pop(key).taken)


def prepared_bytes(
    method: TokenMethod, experts: Sequence[LoraAdapter], dtype: torch.dtype = torch.float32
) -> int:
    """What a set of experts takes on the device: their factors again in `dtype`, and for arrow a float32
    prototype a module."""
    stacks = [stack for expert in experts for stack in expert.stacks]
    factors = dtype.itemsize * sum(stack.a.numel() + stack.bt.numel() for stack in stacks)
    if method is TokenMethod.SPECTR:
        return factors
    return factors + sum(4 * pair.a.shape[1] for expert in experts for pair in expert.pairs.values())
