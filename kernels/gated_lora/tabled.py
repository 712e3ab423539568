"""The operator as a slot table describes it, in torch: what the CUDA kernels are to find in the table."""

from torch import Tensor

from loramux.kernels.gated_lora.dense import DenseForm
from loramux.kernels.gated_lora.form import Bound
from loramux.kernels.gated_lora.plan import Plan
from loramux.kernels.gated_lora.slots import UnionTable


class TabledForm(DenseForm):
    """Also serves plans with a table: captured steps, where nothing can be captured."""

    shares_inputs = True  # it gains nothing, but is to be what runs on a device otherwise
    takes_tables = True

    def bind(self, plan: Plan, module: str, a: Tensor, b: Tensor) -> Bound | None:
        table = plan.table
        if table is None:
            return super().bind(plan, module, a, b)

        def apply(y: Tensor, x: Tensor) -> None:
            tabled_lora_(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), a, b, table)

        return apply


def tabled_lora_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, table: UnionTable) -> None:
    """`y += (x Aᵀ ⊙ g) B` in place, token by token with the rows of its slot; y [T, out], x [T, in]."""
    for token, slot in enumerate(table.slots[: len(x)].tolist()):
        if slot >= 0:
            rank = int(table.ranks[slot])
            rows = table.rows[slot, :rank].long()
            hidden = (a[rows].float() @ x[token].float()) * table.factors[token, :rank]
            y[token] += (hidden @ b[rows].float()).to(y.dtype)
