"""The parts of a merge, lined up: modules where the same adapters meet share one stack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from loramux.adapters.errors import BlendError
from loramux.adapters.lora import FactorStack, LoraAdapter

_CHUNK_BYTES = 8 * 2**20


class Block(NamedTuple):
    """What one adapter contributes to the modules of a joint stack.

    Attributes:
        part: position of the adapter among the parts of the merge.
        a: `[modules, rank, in_features]`.
        bt: `[modules, rank, out_features]`.
        coefs: blend weight times LoRA scale, one per module.
    """

    part: int
    a: Tensor
    bt: Tensor
    coefs: tuple[float, ...]

    @property
    def rank(self) -> int:
        return self.a.shape[1]


@dataclass(frozen=True)
class JointStack:
    """Modules of one shape whose exact merge is sum over blocks of coef * B @ A.

    Attributes:
        modules: module paths, sorted.
        blocks: at least one, in the order of the parts.
        dtype: the type to store a result in.
    """

    modules: tuple[str, ...]
    blocks: tuple[Block, ...]
    dtype: torch.dtype

    @property
    def rank(self) -> int:
        """Rank of the exact result: the sum over blocks."""
        return sum(block.rank for block in self.blocks)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.blocks[0].bt.shape[2], self.blocks[0].a.shape[2]

    def chunks(self) -> Iterator[slice]:
        """Runs of modules whose factors in float64 stay within a cache-sized budget."""
        per_module = 8 * self.rank * sum(self.shape)
        step = max(1, _CHUNK_BYTES // per_module)
        for start in range(0, len(self.modules), step):
            yield slice(start, min(start + step, len(self.modules)))

    def stacked(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Factors of the exact sum for some modules, in float64, coefficients folded into B.

        Returns:
            `[rows, rank, in_features]` and `[rows, rank, out_features]`.
        """
        count, (out_features, in_features) = rows.stop - rows.start, self.shape
        device = self.blocks[0].a.device
        a = torch.empty(count, self.rank, in_features, dtype=torch.float64, device=device)
        bt = torch.empty(count, self.rank, out_features, dtype=torch.float64, device=device)
        start = 0
        for block in self.blocks:
            ranks = slice(start, start + block.rank)
            a[:, ranks] = block.a[rows]
            bt[:, ranks] = block.bt[rows]
            bt[:, ranks] *= column(block.coefs[rows], bt)
            start = ranks.stop
        return a, bt


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """One number per module, shaped to multiply a `[modules, rank, features]` tensor of `like`'s type."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


def join(parts: Sequence[tuple[LoraAdapter, float]]) -> list[JointStack]:
    """Line up adapters module by module; stacks that agree as a whole are used without copying.

    Args:
        parts: adapters with weights other than zero; their target sets, ranks and scales may differ.

    Raises:
        BlendError: two adapters give one module different shapes, or lie on different devices.
    """
    owners = [{module: stack for stack in adapter.stacks for module in stack.modules} for adapter, _ in parts]
    dtype = reduce(torch.promote_types, (adapter.dtype for adapter, _ in parts))
    groups: dict[tuple[int | None, ...], list[str]] = {}
    stacks: dict[tuple[int | None, ...], list[FactorStack | None]] = {}
    for module in sorted(set().union(*owners)):
        found = [owner.get(module) for owner in owners]
        signature = tuple(None if stack is None else id(stack) for stack in found)
        groups.setdefault(signature, []).append(module)
        stacks[signature] = found
    joint = []
    for signature, modules in groups.items():
        blocks = tuple(
            _block(part, stack, modules, parts[part][1])
            for part, stack in enumerate(stacks[signature])
            if stack is not None
        )
        _check_fit(modules[0], blocks, parts)
        joint.append(JointStack(tuple(modules), blocks, dtype))
    return joint


def _block(part: int, stack: FactorStack, modules: Sequence[str], weight: float) -> Block:
    rows = [stack.rows[module] for module in modules]
    coefs = tuple(weight * stack.scales[row] for row in rows)
    first, last = rows[0], rows[-1]
    if rows == list(range(first, last + 1)):
        return Block(part, stack.a[first : last + 1], stack.bt[first : last + 1], coefs)
    index = torch.tensor(rows, device=stack.a.device)
    return Block(part, stack.a.index_select(0, index), stack.bt.index_select(0, index), coefs)


def _check_fit(module: str, blocks: Sequence[Block], parts: Sequence[tuple[LoraAdapter, float]]) -> None:
    first = blocks[0]
    for block in blocks[1:]:
        names = f"adapters {parts[first.part][0].id!r} and {parts[block.part][0].id!r}"
        if (block.a.shape[2], block.bt.shape[2]) != (first.a.shape[2], first.bt.shape[2]):
            raise BlendError(f"{names} differ in the shape of {module}: they are for different bases")
        if block.a.device != first.a.device:
            raise BlendError(f"{names} lie on {first.a.device} and {block.a.device}; use one device")
