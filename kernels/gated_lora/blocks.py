"""The short segments of a batch, turned round: which tokens use a block of rows, and how much of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loramux.kernels.gated_lora.gate_slot import Extent
from loramux.kernels.gated_lora.plan import Segment


@dataclass(frozen=True, eq=False)
class RowBlock:
    """The rows `extent` and the packed positions of the tokens that use them; gate [tokens, rows] float32."""

    extent: Extent
    tokens: tuple[int, ...]
    gate: Tensor
    modules: frozenset[str]


def row_blocks(segments: Sequence[Segment]) -> list[RowBlock]:
    """One block for every extent, with all its tokens, in the order in which parts are added up; neighbours
    that have the same tokens become one."""
    tokens: dict[Extent, list[int]] = {}
    gates: dict[Extent, list[Tensor]] = {}
    modules: dict[Extent, frozenset[str]] = {}
    order: dict[Extent, tuple[str, int]] = {}
    for segment in segments:
        order |= segment.slot.order()
        for extent, gate in segment.slot.parts():
            tokens.setdefault(extent, []).extend(range(segment.start, segment.start + segment.length))
            gates.setdefault(extent, []).append(gate.expand(segment.length, -1))
            modules[extent] = modules.get(extent, frozenset()) | segment.slot.modules
    blocks: list[RowBlock] = []
    for extent in sorted(tokens, key=order.__getitem__):
        block = RowBlock(extent, tuple(tokens[extent]), torch.cat(gates[extent]), modules[extent])
        last = blocks[-1] if blocks else None
        if last and (last.extent[1], last.tokens, last.modules) == (extent[0], block.tokens, block.modules):
            blocks[-1] = RowBlock(
                (last.extent[0], extent[1]),
                last.tokens,
                torch.cat([last.gate, block.gate], dim=1),
                last.modules,
            )
        else:
            blocks.append(block)
    return blocks
