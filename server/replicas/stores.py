"""What stands at an edge for the residency, the shelf and the token mixtures of its replicas, and changes of
them."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from loramux.adapters.blend import Blend
from loramux.adapters.errors import AdapterError
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.residency import Lease, ResidencyStats
from loramux.adapters.sparse.model import SparseModel
from loramux.adapters.sparse.options import DEFAULT, ReadOptions
from loramux.adapters.sparse.shelf import SparseCard, SparseStats
from loramux.adapters.sparse.token_mixtures import TokenMixture
from loramux.server.admin import AdapterAdmin, Loaded
from loramux.server.catalog import Catalog
from loramux.server.errors import RequestError
from loramux.server.leases import ExpertStore, SparseChoice, SparseStore
from loramux.server.replicas.fleet import Fleet
from loramux.server.selection import Router


class FleetExperts:
    """An `ExpertStore`: adapters without numbers, which a request names and a replica holds."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    @property
    def experts(self) -> Mapping[str, LoraAdapter]:
        return self._fleet.experts

    def lease(self, blend: Blend) -> AbstractAsyncContextManager[Lease]:
        return self._fleet.lease(blend)

    def add_expert(self, expert: LoraAdapter) -> None:
        """Show what every replica holds."""
        self._fleet.experts[expert.id] = expert

    def remove_expert(self, expert_id: str) -> None:
        """Show it no more; the replicas are told apart from this."""
        del self._fleet.experts[expert_id]

    def stats(self) -> ResidencyStats:
        return self._fleet.totals.residency()


class FleetShelf:
    """A `SparseStore`: the cards of models that every replica holds."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    @property
    def cards(self) -> Mapping[str, SparseCard]:
        return self._fleet.cards

    def lease(self, id: str) -> AbstractAsyncContextManager[Lease]:
        return self._fleet.lease(SparseChoice(id))

    async def add(self, model: SparseModel) -> SparseCard:
        raise NotImplementedError("replicas read sparse models themselves")

    def remove(self, id: str) -> None:
        """Show it no more; the replicas are told apart from this."""
        del self._fleet.cards[id]

    def stats(self) -> SparseStats:
        return self._fleet.totals.sparse()


class FleetTokens:
    """A `TokenStore`."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def lease(self, mixture: TokenMixture) -> AbstractAsyncContextManager[Lease]:
        return self._fleet.lease(mixture)


class FleetAdmin(AdapterAdmin):
    """Loads and unloads at every replica, or at none. The router, which the edge has, learns of it last."""

    def __init__(
        self,
        fleet: Fleet,
        catalog: Catalog,
        experts: ExpertStore,
        shelf: SparseStore,
        router: Router,
        root: Path,
        read: Callable[[Path, str, ReadOptions], LoraAdapter | SparseModel],
    ) -> None:
        self._fleet = fleet
        super().__init__(catalog, experts, shelf, router, root, read)
        self._busy: asyncio.Lock = fleet.changes.busy

    async def load(
        self, name: str, path: str, options: ReadOptions = DEFAULT, examples: Sequence[str] | None = None
    ) -> Loaded:
        """As `AdapterAdmin.load`.

        Raises:
            Conflict, RequestError, RoutingExamplesError: as there.
            NotReady: a replica was lost meanwhile; nothing has changed.
        """
        changes = self._fleet.changes
        async with self._busy:
            self._refuse_taken(name)
            folder = self._confined(path)
            try:
                found = await changes.add(name, folder, options)
            except AdapterError as error:
                raise RequestError(str(error), param="lora_path", code="adapter_refused") from None
            try:
                if isinstance(found, SparseCard):
                    self._refuse_examples(found, examples)
                    joined = None
                else:
                    joined = await self._joined(found, examples)
            except BaseException:
                await changes.take_back(name)
                raise
            # No await from here on: a request finds both the expert and its route, or neither.
            changes.show(found)
            if joined is not None:
                self._router.use(joined.router)
        return Loaded(found, None if examples is None else 0 if joined is None else joined.truncated)

    async def unload(self, name: str) -> None:
        """As `AdapterAdmin.unload`: requests that run keep it to their end, also at another replica."""
        async with self._busy:
            if name not in self._catalog.experts and name not in self._catalog.sparse:
                raise self._unknown(name)
            if name in self._catalog.experts:
                router = await self._without_route(name)
                self._residency.remove_expert(name)
                if router is not None:
                    self._router.use(router)
            else:
                self._shelf.remove(name)
            await self._fleet.changes.remove(name)


def read_nothing(folder: Path, name: str, options: ReadOptions) -> LoraAdapter | SparseModel:
    """An edge reads no adapters."""
    raise NotImplementedError("replicas read adapters themselves")
