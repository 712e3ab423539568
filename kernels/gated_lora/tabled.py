"""The operator as a slot table describes it, in torch: what the CUDA kernels are to find in the table."""

from torch import Tensor

from loramux.kernels.gated_lora.form import Bound
from loramux.kernels.gated_lora.plan import Plan
from loramux.kernels.gated_lora.slots import SlotTable


class TabledForm:
    """Serves plans with a table and no others: the steps that are captured elsewhere, where nothing can
    be."""

    takes_tables = True

    def bind(self, plan: Plan, module: str, a: Tensor, b: Tensor) -> Bound | None:  # noqa: ARG002 - of all forms
        table = plan.table
        if table is None:
            raise ValueError("this form computes what a table says; the plan has none")

        def apply(y: Tensor, x: Tensor) -> None:
            tabled_lora_(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), a, b, table)

        return apply


def tabled_lora_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, table: SlotTable) -> None:
    """`y += (x Aᵀ ⊙ g) B` in place, token by token with the rows of its slot; y [T, out], x [T, in]."""
    for token, slot in enumerate(table.slots[: len(x)].tolist()):
        if slot >= 0:
            rank = int(table.ranks[slot])
            rows = table.rows[slot, :rank].long()
            hidden = (a[rows].float() @ x[token].float()) * table.gates[slot, :rank]
            y[token] += (hidden @ b[rows].float()).to(y.dtype)
