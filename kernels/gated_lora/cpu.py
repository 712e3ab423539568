"""The operator as a few dense products per layer, over the rows that are in use and no others."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import linear

from loramux.kernels.gated_lora.plan import Run


class BoundRun(NamedTuple):
    """A run with its rows of one module's factors looked up: a [r, in], b [r, out], gate [t, r] or [r]."""

    tokens: slice
    a: Tensor
    gate: Tensor
    b: Tensor


def bind(runs: Sequence[Run], a: Tensor, b: Tensor) -> list[BoundRun]:
    """Look up the rows once for as long as the plan is used; a [R, in] and b [R, out] are not copied."""
    return [BoundRun(run.tokens, a[run.rows], run.gate, b[run.rows]) for run in runs]


def gated_lora_(y: Tensor, x: Tensor, runs: Sequence[BoundRun]) -> None:
    """Add the gated low-rank product to `y` [T, out] in place; `x` is [T, in].

    The gate is applied in float32 whatever the dtype of the factors.
    """
    for tokens, a, gate, b in runs:
        hidden = linear(x[tokens], a)  # [t, r]
        if hidden.dtype == gate.dtype:
            hidden.mul_(gate)
        else:
            hidden = (hidden * gate).to(b.dtype)
        y[tokens].addmm_(hidden, b)
