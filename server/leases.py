"""Step 4 of a request: its mixture made resident and held, whichever kind of mixture it is."""

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from loramux.adapters.blend import Blend
from loramux.adapters.residency import Lease, Residency
from loramux.adapters.sparse.shelf import Shelf
from loramux.adapters.sparse.token_mixtures import TokenMixture, TokenMixtures


@dataclass(frozen=True, slots=True)
class SparseChoice:
    """A sparse model by its id."""

    id: str


Mixture = Blend | SparseChoice | TokenMixture


class Leases:
    """Where each kind of mixture becomes resident."""

    def __init__(self, residency: Residency, shelf: Shelf, tokens: TokenMixtures) -> None:
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
