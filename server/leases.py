"""Step 4 of a request: its mixture made resident and held, whichever kind of mixture it is."""

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from loramux.adapters.blend import Blend
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.residency import Lease, ResidencyStats
from loramux.adapters.sparse.model import SparseModel
from loramux.adapters.sparse.shelf import SparseCard, SparseStats
from loramux.adapters.sparse.token_mixtures import TokenMixture


@dataclass(frozen=True, slots=True)
class SparseChoice:
    """A sparse model by its id."""

    id: str


Mixture = Blend | SparseChoice | TokenMixture


class ExpertStore(Protocol):
    """Where the experts are, and blends of them become resident: `Residency`, or what stands for one, in
    other processes or on backends.

    `experts` is a live view. `add_expert` raises `BlendError` where one cannot be served; requests that run
    keep what `remove_expert` takes away.
    """

    @property
    def experts(self) -> Mapping[str, LoraAdapter]: ...
    def lease(self, blend: Blend, /) -> AbstractAsyncContextManager[Lease]: ...
    def add_expert(self, expert: LoraAdapter, /) -> None: ...
    def remove_expert(self, expert_id: str, /) -> None: ...
    def stats(self) -> ResidencyStats: ...


class SparseStore(Protocol):
    """Where the sparse models are: `Shelf`, or what stands for one."""

    @property
    def cards(self) -> Mapping[str, SparseCard]: ...
    def lease(self, id: str, /) -> AbstractAsyncContextManager[Lease]: ...
    async def add(self, model: SparseModel, /) -> SparseCard: ...
    def remove(self, id: str, /) -> None: ...
    def stats(self) -> SparseStats: ...


class TokenStore(Protocol):
    """Where mixtures that tokens choose from become ready: `TokenMixtures`, or what stands for one."""

    def lease(self, mixture: TokenMixture, /) -> AbstractAsyncContextManager[Lease]: ...


class Leases:
    """Where each kind of mixture becomes resident."""

    def __init__(self, residency: ExpertStore, shelf: SparseStore, tokens: TokenStore) -> None:
        self._residency = residency
        self._shelf = shelf
        self._tokens = tokens

    def lease(self, mixture: Mixture) -> AbstractAsyncContextManager[Lease]:
        """Hold a mixture on the device until the context ends.

        Raises:
            BlendError: it cannot be formed, does not fit, or names what is not loaded (any more).
        """
        match mixture:
            case SparseChoice():
                return self._shelf.lease(mixture.id)
            case TokenMixture():
                return self._tokens.lease(mixture)
            case _:
                return self._residency.lease(mixture)
