"""The Triton form behind the interface of all forms: one table a step, filled when the plan changes."""

from collections.abc import Sequence

from torch import Tensor

from loramux.kernels.gated_lora.form import Bound, BoundAll
from loramux.kernels.gated_lora.plan import BARE, GateSlot, Plan
from loramux.kernels.gated_lora.slots import SlotTable, UnionTable
from loramux.kernels.gated_lora.triton import expand_all_, gated_lora_all_, shrink


class TritonForm:
    """Shrink, gate and expand in two launches a module, every token with the rows of its own slot.

    A table has a fixed capacity, on which the shape of the launches depends; capacities are powers of two, so
    that a handful of tables serves every batch.
    """

    shares_inputs = True
    takes_tables = True

    def __init__(self) -> None:
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
            return _of_table(plan.table, a, b)
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

        return apply

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


def _of_table(table: UnionTable, a: Sequence[Tensor], b: Sequence[Tensor]) -> BoundAll:
    """What the table will say by the time that this is replayed."""

    def apply(ys: Sequence[Tensor], x: Tensor) -> None:
        outputs = [y.view(-1, y.shape[-1]) for y in ys]
        hidden = shrink(x.reshape(-1, x.shape[-1]), a, table)
        expand_all_(outputs, hidden, b, table, table.factors[: len(outputs[0])])

    return apply


def _capacity(count: int) -> int:
    """The next power of two, and at least 16."""
    return max(16, 1 << (count - 1).bit_length())
