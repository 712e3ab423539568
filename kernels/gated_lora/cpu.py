"""The operator as a few dense products per layer, over the rows that are in use and no others."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import linear

from loramux.kernels.gated_lora.plan import Run


def gated_lora_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, runs: Sequence[Run]) -> None:
    """Add the gated low-rank product to `y` in place.

    Shapes: y [T, out], x [T, in], a [R, in], b [R, out]. The gate is applied in float32 whatever the dtype of
    the factors.
    """
    for run in runs:
        hidden = linear(x[run.tokens], a[run.rows])  # [t, r]
        hidden = (hidden * run.gate).to(b.dtype)
        y[run.tokens].addmm_(hidden, b[run.rows])
