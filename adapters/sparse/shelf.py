"""The sparse models that are served: placed on the device when they come, freed after their last lease."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from types import MappingProxyType

from loramux.adapters.errors import BlendError
from loramux.adapters.quiet_threads import QuietThreads
from loramux.adapters.residency import Handle, Lease
from loramux.adapters.sparse.allowance import Allowance
from loramux.adapters.sparse.model import Kind, RankMixture, SparseModel
from loramux.adapters.sparse.slot import SparseSlot
from loramux.adapters.sparse.tally import ExpertLoad


@dataclass(frozen=True, slots=True)
class SparseCard:
    """What is known of a placed model; its tensors are the slot's.

    Attributes:
        rank: the largest rank of any of its factors.
        modules: linear modules and feed-forward blocks that it changes.
        nbytes: of its tensors, on the device when they are there.
    """

    id: str
    kind: Kind
    content_hash: str
    rank: int
    modules: int
    nbytes: int
    summary: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class SparseStats:
    """A snapshot for `/metrics`. `nbytes` includes unloaded models that running requests still hold."""

    nbytes: int = 0
    loads: Mapping[str, ExpertLoad] = field(default_factory=dict)


@dataclass(eq=False)
class _Placed:
    card: SparseCard
    key: str
    slot: SparseSlot | None
    taken: int
    pins: int = 0
    coming: asyncio.Lock = field(default_factory=asyncio.Lock)


class Shelf:
    """Sparse models by id. Only placing one, which may copy gigabytes, leaves the event loop.

    `place` puts a model's tensors on the device, within the `allowance`. All models of the shelf stay there:
    they are few, and chosen by the operator. With `reread`, which reads the model of an id again, those that
    are given at the start come to the device with their first request; their room is theirs from the start.

    Raises:
        BlendError: the allowance is too small for `models`.
    """

    def __init__(
        self,
        place: Callable[[SparseModel], SparseSlot],
        models: Iterable[SparseModel] = (),
        allowance: Allowance | None = None,
        reread: Callable[[str], SparseModel] | None = None,
    ) -> None:
        self._place = place
        self._reread = reread
        self._allowance = allowance or Allowance()
        self._placed: dict[str, _Placed] = {}
        self._leaving: set[_Placed] = set()
        self._cards: dict[str, SparseCard] = {}
        self._placing = QuietThreads("loramux-place")
        for model in models:
            self._take(model)
            self._put(model, place(model) if reread is None else None)

    @property
    def cards(self) -> Mapping[str, SparseCard]:
        """Every model that may be asked for by id; a live view."""
        return MappingProxyType(self._cards)

    async def add(self, model: SparseModel) -> SparseCard:
        """Place a model and serve it from then on.

        Raises:
            BlendError: the id is taken, or the allowance is too small.
        """
        self._refuse_taken(model.id)
        self._take(model)
        try:
            return self._put(model, await self._placing.run(self._place, model))
        except BaseException:
            self._allowance.give(model.nbytes)
            raise

    def remove(self, id: str) -> None:
        """Take a model out: running requests keep it, new ones no longer find it.

        Raises:
            BlendError: there is no such model.
        """
        placed = self._placed.pop(id, None)
        if placed is None:
            raise BlendError(f"there is no sparse model {id!r}")
        del self._cards[id]
        self._leaving.add(placed)
        self._free(placed)

    @asynccontextmanager
    async def lease(self, id: str) -> AsyncIterator[Lease]:
        """Hold a model on the device until the context ends.

        Raises:
            BlendError: there is no such model (any more), or its files have changed since the start.
            AdapterError: its files cannot be read any more.
        """
        placed = self._placed.get(id)
        if placed is None:
            raise BlendError(f"there is no sparse model {id!r}")
        placed.pins += 1
        card = placed.card
        try:
            slot = placed.slot or await self._settle(placed)
            yield Lease(placed.key, card.kind, Handle(placed.key, slot), card.rank, 0.0, True, 0.0)
        finally:
            placed.pins -= 1
            self._free(placed)

    def stats(self) -> SparseStats:
        held = (*self._placed.values(), *self._leaving)
        return SparseStats(
            nbytes=sum(placed.card.nbytes for placed in held if placed.slot is not None),
            loads={id: one.slot.load() for id, one in self._placed.items() if one.slot is not None},
        )

    def check_integrity(self) -> None:
        """For tests, when nothing is leased.

        Raises:
            RuntimeError: a lease was not given back, or an unloaded model is still held.
        """
        pinned = [placed.card.id for placed in self._placed.values() if placed.pins]
        leaving = [placed.card.id for placed in self._leaving]
        if pinned or leaving:
            raise RuntimeError(f"still pinned: {pinned}; unloaded but held: {leaving}")

    def _take(self, model: SparseModel) -> None:
        self._allowance.take(model.nbytes, f"sparse model {model.id!r}")

    def _refuse_taken(self, id: str) -> None:
        if id in self._placed:
            raise BlendError(f"a sparse model with the id {id!r} is loaded already; unload it first")

    async def _settle(self, placed: _Placed) -> SparseSlot:
        """Bring a model to the device that waited for its first request."""
        async with placed.coming:
            if placed.slot is None:
                placed.slot = await self._placing.run(self._read_and_place, placed.card)
            return placed.slot

    def _read_and_place(self, card: SparseCard) -> SparseSlot:
        assert self._reread is not None
        model = self._reread(card.id)
        if model.content_hash != card.content_hash:
            raise BlendError(f"the files of sparse model {card.id!r} have changed since the server started")
        return self._place(model)

    def _put(self, model: SparseModel, slot: SparseSlot | None) -> SparseCard:
        self._refuse_taken(model.id)
        key = sha256(f"{model.kind} {model.content_hash}".encode()).hexdigest()[:32]
        card = SparseCard(
            id=model.id,
            kind=model.kind,
            content_hash=model.content_hash,
            rank=largest_rank(model),
            modules=len(model.plain) + len(model.linear) + len(model.ffn),
            nbytes=model.nbytes if slot is None else slot.nbytes,
            summary=model.summary,
        )
        self._placed[model.id] = _Placed(card, key, slot, model.nbytes)
        self._cards[model.id] = card
        return card

    def _free(self, placed: _Placed) -> None:
        if placed in self._leaving and not placed.pins:
            self._leaving.discard(placed)
            if placed.slot is not None:
                placed.slot.release()
            self._allowance.give(placed.taken)


def largest_rank(model: SparseModel) -> int:
    """The largest rank of any factors of a model; 0 for one without factors."""
    ranks = [pair.rank for pair in model.plain.values()]
    ranks += [
        mixture.a.shape[0] if isinstance(mixture, RankMixture) else mixture.factors.rank
        for mixture in model.linear.values()
    ]
    for block in model.ffn.values():
        ranks += [factors.rank for factors in block.projections.values()]
    return max(ranks, default=0)
