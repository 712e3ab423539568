"""What every form of the operator offers."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from loramux.kernels.gated_lora.plan import Plan

#: Adds a module's part of the plan to `y` [..., out] in place, given its input `x` [..., in]; the leading
#: dimensions are the packed tokens, and `y` is contiguous.
Bound = Callable[[Tensor, Tensor], None]


class Form(Protocol):
    """One way to compute the operator. Plans come one after another, never two at a time.

    Attributes:
        takes_tables: whether it can serve a plan that has a table in place of segments.
    """

    takes_tables: bool

    def bind(self, plan: Plan, module: str, a: Tensor, b: Tensor) -> Bound | None:
        """Prepare one module (a [R, in], b [R, out]) for as long as `plan` lasts; `None`: it adds nothing."""
        ...
