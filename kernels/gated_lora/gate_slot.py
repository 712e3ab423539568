"""A resident blend as the operator sees it."""

from dataclasses import dataclass

import torch
from torch import Tensor

Extent = tuple[int, int]


@dataclass(frozen=True, eq=False)
class GateSlot:
    """Where one resident blend lives in the stacked factors.

    `extents` are half-open row ranges; `gate` holds one float32 factor per row of their concatenation;
    `modules` are the module paths in which any of these rows is non-zero.
    """

    extents: tuple[Extent, ...]
    gate: Tensor
    modules: frozenset[str]

    def __post_init__(self) -> None:
        rows = sum(hi - lo for lo, hi in self.extents)
        if self.gate.shape != (rows,):
            raise ValueError(f"gate has shape {tuple(self.gate.shape)}, the extents hold {rows} rows")

    def parts(self) -> list[tuple[Extent, Tensor]]:
        """Every extent with its piece of the gate, in rising order."""
        gates = torch.split(self.gate, [hi - lo for lo, hi in self.extents])
        return sorted(zip(self.extents, gates, strict=True), key=lambda part: part[0])
