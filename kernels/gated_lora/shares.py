"""The part of a step that belongs to slots whose gates depend on the token."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

#: Adds to y [T, out] in place, given x [T, in]: the tokens of one slot and no others.
Adding = Callable[[Tensor, Tensor], None]


class TokenSlot(Protocol):
    """A slot that computes its own part of every module, because its gates depend on the token."""

    @property
    def modules(self) -> Collection[str]:
        """The linear modules it adds to."""
        ...

    def bind(self, module: str) -> Adding | None:
        """What it adds at a linear module; `None`: nothing."""
        ...


@dataclass(frozen=True, eq=False)
class Share:
    """The tokens of a step that use one slot, of however many requests.

    Attributes:
        lengths: tokens of each request, in order.
        tokens: their packed positions, a slice where they are neighbours.
    """

    slot: TokenSlot
    lengths: tuple[int, ...]
    tokens: slice | Tensor

    def take(self, x: Tensor) -> Tensor:
        """The rows of x [T, n] that are of this share; a view where they are neighbours."""
        return x[self.tokens]

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Write rows back to where `take` found them."""
        x[self.tokens] = rows

    def add_(self, adding: Adding, y: Tensor, x: Tensor) -> None:
        """Apply to the rows of this share, y [T, out] in place."""
        mine = self.take(y)
        adding(mine, self.take(x))
        if not isinstance(self.tokens, slice):
            self.put(y, mine)


def share_out(spans: Sequence[tuple[TokenSlot, int, int]]) -> tuple[Share, ...]:
    """One share for every slot, from (slot, first token, number of tokens) of each request in order."""
    spans_of: dict[int, list[tuple[int, int]]] = {}
    slots = {id(slot): slot for slot, _, _ in spans}
    for slot, start, length in spans:
        spans_of.setdefault(id(slot), []).append((start, length))
    return tuple(
        Share(slots[key], tuple(length for _, length in mine), _positions(mine))
        for key, mine in spans_of.items()
    )


def _positions(spans: Sequence[tuple[int, int]]) -> slice | Tensor:
    if all(start + length == following for (start, length), (following, _) in pairwise(spans)):
        return slice(spans[0][0], sum(spans[-1]))
    return torch.cat([torch.arange(start, start + length) for start, length in spans])
