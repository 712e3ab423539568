"""What every form of the operator offers."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from loramux.kernels.gated_lora.plan import Plan

#: Adds a module's part of the plan to `y` [..., out] in place, given its input `x` [..., in]; the leading
#: dimensions are the packed tokens, and `y` is contiguous.
Bound = Callable[[Tensor, Tensor], None]

#: The same for modules that share their input: their outputs in order, and the input.
BoundAll = Callable[[Sequence[Tensor], Tensor], None]


class Form(Protocol):
    """One way to compute the operator. Plans come one after another, never two at a time.

    Attributes:
        shares_inputs: whether modules that share their input cost less together than one by one.
        takes_tables: whether it can serve a plan that has a table in place of segments.
    """

    shares_inputs: bool
    takes_tables: bool

    def bind(self, plan: Plan, module: str, a: Tensor, b: Tensor) -> Bound | None:
        """Prepare one module (a [R, in], b [R, out]) for as long as `plan` lasts; `None`: it adds nothing."""
        ...

    def bind_all(
        self, plan: Plan, modules: Sequence[str], a: Sequence[Tensor], b: Sequence[Tensor]
    ) -> BoundAll | None:
        """Prepare modules that share their input."""
        ...


def bind_each(
    form: Form, plan: Plan, modules: Sequence[str], a: Sequence[Tensor], b: Sequence[Tensor]
) -> BoundAll | None:
    """`bind_all` of a form that has nothing to gain from it."""
    bounds = [form.bind(plan, *one) for one in zip(modules, a, b, strict=True)]
    if not any(bounds):
        return None

    def apply(ys: Sequence[Tensor], x: Tensor) -> None:
        for bound, y in zip(bounds, ys, strict=True):
            if bound is not None:
                bound(y, x)

    return apply
