"""A resident blend as the operator sees it."""

from dataclasses import dataclass

import torch
from torch import Tensor

Extent = tuple[int, int]


@dataclass(frozen=True, eq=False)
class GateSlot:
    """Where one resident blend lives in the stacked factors.

    `extents` are half-open row ranges; `gate` holds one float32 factor per row of their concatenation;
    `modules` are the module paths in which any of these rows is non-zero. `contents` says what fills each
    extent: parts are added up in its order, which does not depend on where rows were free.
    """

    extents: tuple[Extent, ...]
    gate: Tensor
    modules: frozenset[str]
    contents: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rows = sum(hi - lo for lo, hi in self.extents)
        if self.gate.shape != (rows,):
            raise ValueError(f"gate has shape {tuple(self.gate.shape)}, the extents hold {rows} rows")

    def parts(self) -> list[tuple[Extent, Tensor]]:
        """Every extent with its piece of the gate, in the order in which they are added up."""
        gates = torch.split(self.gate, [hi - lo for lo, hi in self.extents])
        order = self.order()
        return sorted(zip(self.extents, gates, strict=True), key=lambda part: order[part[0]])

    def order(self) -> dict[Extent, tuple[str, int]]:
        """What the parts of all slots are sorted by: their contents, whose rows lie in rising order."""
        names = self.contents or ("",) * len(self.extents)
        return {extent: (name, extent[0]) for extent, name in zip(self.extents, names, strict=True)}
