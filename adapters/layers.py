"""The base's linear layers with the arena's rows beside them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loramux.adapters.arena import Arena
from loramux.adapters.errors import BaseMismatchError
from loramux.kernels.gated_lora import BoundRun, Plan, bind, gated_lora_

BARE = Plan()


class AdapterLayers:
    """Puts a gated layer around every linear module the arena has rows for; one plan drives them all."""

    def __init__(self, model: nn.Module, arena: Arena) -> None:
        self.plan = BARE
        self.arena = arena
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
        self._bound: list[BoundRun] = []

    @property
    def weight(self) -> Tensor:
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        plan = self._layers[0].plan
        if plan.is_empty:
            return y
        if plan is not self._bound_plan:
            self._bound = bind(plan.of(self.path), self._a[0], self._b[0])
            self._bound_plan = plan
        if self._bound:
            with torch.no_grad():
                gated_lora_(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), self._bound)
        return y
