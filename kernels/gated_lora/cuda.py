"""The Triton form behind the interface of all forms: one table a step, filled when the plan changes."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from loramux.kernels.gated_lora.form import After, Bound, BoundAll
from loramux.kernels.gated_lora.gate_slot import GateSlot
from loramux.kernels.gated_lora.plan import BARE, Plan
from loramux.kernels.gated_lora.slots import SlotTable, UnionTable
from loramux.kernels.gated_lora.triton import expand_all_, gated_lora_all_, shrink


class TritonForm:
    """Shrink, gate and expand in two launches a module, every token with the rows of its own slot.

    A table has a fixed capacity, on which the shape of the launches depends; capacities are powers of two, so
    that a handful of tables serves every batch.
    """

    shares_inputs = True
    takes_tables = True

    def __init__(self, *, overlap: bool = True) -> None:
        """`overlap`: under a plan with a table, x is shrunk on a second stream, beside the base's
        products."""
        self.overlap = overlap
        self._plan = BARE
        self._tables: dict[tuple[int, int, int], SlotTable] = {}
        self._table: SlotTable | None = None
        self._modules: frozenset[str] = frozenset()

    def bind(self, plan: Plan, module: str, a: Tensor, b: Tensor) -> Bound | None:
        bound = self.bind_all(plan, [module], [a], [b])
        return None if bound is None else lambda y, x: bound([y], x)

    def bind_all(
        self, plan: Plan, modules: Sequence[str], a: Sequence[Tensor], b: Sequence[Tensor]
    ) -> BoundAll | None:
        if plan.table is not None:
            return _OfTable(plan.table, a, b, overlap=self.overlap)
        if plan is not self._plan:
            self._table = self._filled(plan, a[0])
            self._modules = frozenset[str]().union(*(segment.slot.modules for segment in plan.segments))
            self._plan = plan
        table = self._table
        if table is None or self._modules.isdisjoint(modules):
            return None
        end = table.tokens  # bare tokens behind the last slot may be more than the table has room for

        def apply(ys: Sequence[Tensor], x: Tensor) -> None:
            outputs = [y.view(-1, y.shape[-1])[:end] for y in ys]
            gated_lora_all_(outputs, x.reshape(-1, x.shape[-1])[:end], a, b, table)

        return After(apply)

    def _filled(self, plan: Plan, a: Tensor) -> SlotTable | None:
        if not plan.segments:
            return None
        segments: list[tuple[GateSlot | None, int]] = []
        end = 0
        for segment in plan.segments:
            if segment.start > end:
                segments.append((None, segment.start - end))
            segments.append((segment.slot, segment.length))
            end = segment.tokens.stop
        slots = {id(segment.slot): segment.slot for segment in plan.segments}
        rank = max(slot.gate.numel() for slot in slots.values())
        size = (_capacity(end), _capacity(len(slots)), _capacity(rank))
        table = self._tables.get(size)
        if table is None:
            table = self._tables[size] = SlotTable(*size, max_rows=a.shape[0], device=a.device)
        table.fill(segments)
        return table


class _OfTable:
    """Adds what a table will say by the time that this is replayed."""

    def __init__(self, table: UnionTable, a: Sequence[Tensor], b: Sequence[Tensor], *, overlap: bool) -> None:
        self._table, self._a, self._b = table, a, b
        self._side = _side_stream(table.device) if overlap and table.device.type == "cuda" else None
        self._hidden: Tensor | None = None

    def begin(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        if self._side is None:
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            self._hidden = shrink(x, self._a, self._table)

    def __call__(self, ys: Sequence[Tensor], x: Tensor) -> None:
        hidden, self._hidden = self._hidden, None
        if hidden is None:
            hidden = shrink(x.reshape(-1, x.shape[-1]), self._a, self._table)
        elif self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)
        outputs = [y.view(-1, y.shape[-1]) for y in ys]
        expand_all_(outputs, hidden, self._b, self._table, self._table.factors[: len(outputs[0])])


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _capacity(count: int) -> int:
    """The next power of two, and at least 16."""
    return max(16, 1 << (count - 1).bit_length())
