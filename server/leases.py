"""Step 4 of a request: its mixture made resident and held, whichever kind of mixture it is."""

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from loramux.adapters.blend import Blend
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.residency import Lease, ResidencyStats
from loramux.adapters.sparse.shelf import Shelf
from loramux.adapters.sparse.token_mixtures import TokenMixture, TokenMixtures


@dataclass(frozen=True, slots=True)
class SparseChoice:
    """A sparse model by its id."""

    id: str


Mixture = Blend | SparseChoice | TokenMixture


class Residence(Protocol):
    """Where the blends of a pool become resident: on this machine, or on backends."""

    @property
    def experts(self) -> Mapping[str, LoraAdapter]:
        """Every expert by id; a live view."""
        ...

    def lease(self, blend: Blend) -> AbstractAsyncContextManager[Lease]:
        """Hold a blend until the context ends."""
        ...

    def add_expert(self, expert: LoraAdapter) -> None:
        """Serve one more; raises `BlendError` where it cannot be."""
        ...

    def remove_expert(self, expert_id: str) -> None:
        """Serve one less; running requests keep it."""
        ...

    def stats(self) -> ResidencyStats:
        """A snapshot for `/metrics`."""
        ...


class Leases:
    """Where each kind of mixture becomes resident."""

    def __init__(self, residency: Residence, shelf: Shelf, tokens: TokenMixtures) -> None:
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
