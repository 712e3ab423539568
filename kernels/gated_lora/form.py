"""What every form of the operator offers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from loramux.kernels.gated_lora.plan import Plan

#: Adds a module's part of the plan to `y` [..., out] in place, given its input `x` [..., in]; the leading
#: dimensions are the packed tokens, and `y` is contiguous.
Bound = Callable[[Tensor, Tensor], None]


class BoundAll(Protocol):
    """The same for modules that share their input."""

    def begin(self, x: Tensor) -> None:
        """Called with the input before the base's own products are launched."""
        ...

    def __call__(self, ys: Sequence[Tensor], x: Tensor) -> None:
        """Add to the modules' outputs, in order."""
        ...


@dataclass(frozen=True, slots=True)
class After:
    """A `BoundAll` that does everything once the outputs are there."""

    add: Callable[[Sequence[Tensor], Tensor], None]

    def begin(self, x: Tensor) -> None:
        """Nothing."""

    def __call__(self, ys: Sequence[Tensor], x: Tensor) -> None:
        self.add(ys, x)


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

    return After(apply)
