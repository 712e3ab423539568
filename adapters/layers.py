"""The base's linear layers with the arena's rows beside them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loramux.adapters.arena import Arena
from loramux.adapters.errors import BaseMismatchError
from loramux.kernels.gated_lora import Bound, Form, Plan, choose_form

BARE = Plan()


class AdapterLayers:
    """Puts a gated layer around every linear module the arena has rows for; one plan drives them all.

    `form` computes what they add; by default the fastest one for the arena's device and dtype.
    """

    def __init__(self, model: nn.Module, arena: Arena, form: Form | None = None) -> None:
        self.plan = BARE
        self.arena = arena
        self.form = form or choose_form(arena.device, next(model.parameters()).dtype, arena.dtype)
        for path in arena.a:
            parent_path, _, name = path.rpartition(".")
            try:
                parent = model.get_submodule(parent_path)
                linear = getattr(parent, name)
            except AttributeError as error:
                raise BaseMismatchError(f"the base model has no module {path!r}") from error
            setattr(parent, name, GatedLinear(linear, path, self))

    @contextmanager
    def running(self, plan: Plan) -> Iterator[None]:
        """Forward passes inside this context apply `plan`; they must not overlap."""
        self.plan = plan
        try:
            yield
        finally:
            self.plan = BARE


class GatedLinear(nn.Module):
    """`base(x)` plus what the current plan adds. Works around any linear layer, 4-bit ones included."""

    def __init__(self, base: nn.Module, path: str, layers: AdapterLayers) -> None:
        super().__init__()
        self.base = base
        self.path = path
        # A plain list hides the owner from nn.Module, which would otherwise not mind, but also the arena's
        # tensors from `parameters()`, `to()` and state dicts: they are not weights of the model.
        self._layers = [layers]
        self._a = [layers.arena.a[path]]
        self._b = [layers.arena.b[path]]
        self._bound_plan = BARE
        self._bound: Bound | None = None

    @property
    def weight(self) -> Tensor:
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        layers = self._layers[0]
        plan = layers.plan
        if plan.is_empty:
            return y
        if plan is not self._bound_plan:
            self._bound = layers.form.bind(plan, self.path, self._a[0], self._b[0])
            self._bound_plan = plan
        if self._bound is not None:
            with torch.no_grad():
                self._bound(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]))
        return y
