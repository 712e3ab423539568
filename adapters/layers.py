"""The base's linear layers with the arena's rows beside them."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import NamedTuple
from weakref import WeakSet

from torch import Tensor, nn

from loramux.adapters.arena import Arena
from loramux.adapters.errors import BaseMismatchError
from loramux.adapters.sparse.ffn_layer import FeedForwardLayer
from loramux.adapters.sparse.slot import SparseSlot
from loramux.kernels.gated_lora import (
    BARE,
    Adding,
    Bound,
    BoundAll,
    Form,
    Plan,
    Share,
    TokenSlot,
    choose_form,
)

#: Names of modules that, under one parent, take one input in most models, in the order in which they are
#: called.
SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Place(NamedTuple):
    """Where a layer of ours stands for one of the base's while a plan has anything to add."""

    parent: nn.Module
    name: str
    base: nn.Module
    layer: nn.Module


class AdapterLayers:
    """Puts a gated layer in the place of every linear module the arena has rows for; one plan drives them
    all. A plan without adapters puts the base's own modules back: such a step runs no code of ours.

    `form` computes what the layers add; by default the fastest one for the arena's device and dtype.
    """

    def __init__(self, model: nn.Module, arena: Arena, form: Form | None = None) -> None:
        self.current = BARE
        self.arena = arena
        self._model = model
        self._blocks: dict[str, FeedForwardLayer] = {}
        self._places: list[_Place] = []
        self._in_place = False
        self._prepared: WeakSet[TokenSlot] = WeakSet()
        self._changing = Lock()
        self.form = form or choose_form(arena.device, next(model.parameters()).dtype, arena.dtype)
        for path in arena.a:
            parent, name, linear = _find(model, path)
            self._places.append(_Place(parent, name, linear, GatedLinear(linear, path, self)))
        if self.form.shares_inputs:
            gated = {
                place.layer.path: place.layer
                for place in self._places
                if isinstance(place.layer, GatedLinear)
            }
            for group in siblings(gated):
                Siblings([gated[path] for path in group])
            for layer in gated.values():
                if not layer.siblings:
                    Siblings([layer])

    @property
    def plan(self) -> Plan:
        """What forward passes apply."""
        return self.current

    @plan.setter
    def plan(self, plan: Plan) -> None:
        for share in plan.shares:
            if share.slot not in self._prepared:
                self.prepare(share.slot)
        adds = not plan.is_empty
        if adds is not self._in_place:
            self._put(adds)
        self.current = plan

    def _put(self, ours: bool) -> None:
        """Put our layers in place, or the base's own."""
        with self._changing:
            for place in self._places:
                setattr(place.parent, place.name, place.layer if ours else place.base)
            self._in_place = ours

    def prepare(self, slot: TokenSlot) -> None:
        """Make layers for the feed-forward blocks that a slot changes. A plan does this for its slots; doing
        it when a model is loaded tells early whether the model fits.

        Raises:
            BaseMismatchError: the base has no such module or block, or the block is of no known form.
        """
        if missing := sorted(set(slot.modules) - self.arena.a.keys()):
            raise BaseMismatchError(f"the base model has no adaptable module {missing[0]!r}")
        blocks = slot.blocks if isinstance(slot, SparseSlot) else {}
        with self._changing:
            found = {path: _find(self._model, path) for path in blocks}
            for path, (_, _, block) in found.items():
                blocks[path].check(block.base if isinstance(block, FeedForwardLayer) else block, path)
            for path in found.keys() - self._blocks.keys():
                parent, name, block = found[path]
                layer = self._blocks[path] = FeedForwardLayer(block, path, self)
                self._places.append(_Place(parent, name, block, layer))
                if self._in_place:
                    setattr(parent, name, layer)
            self._prepared.add(slot)

    @contextmanager
    def running(self, plan: Plan) -> Iterator[None]:
        """Forward passes inside this context apply `plan`; they must not overlap."""
        self.plan = plan
        try:
            yield
        finally:
            self.plan = BARE


def siblings(paths: Collection[str]) -> list[list[str]]:
    """Modules that usually share their input, in the order in which they are called; only groups of
    several."""
    parents: dict[str, set[str]] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        parents.setdefault(parent, set()).add(name)
    groups = []
    for parent, names in parents.items():
        for together in SHARING:
            present = [f"{parent}.{name}" for name in together if name in names]
            if len(present) > 1:
                groups.append(present)
    return groups


class Siblings:
    """Gated layers that take one input: the first that is called computes them all, and the others find what
    is theirs. A layer may be its own only sibling.

    Whether a layer's input is the very tensor that the first one had is looked at in every call: where it is
    not, the layer computes alone.
    """

    def __init__(self, members: Sequence["GatedLinear"]) -> None:
        self._members = members
        self._paths = [member.path for member in members]
        self._plan = BARE
        self._bound: BoundAll | None = None
        self._x: Tensor | None = None
        self._ys: dict[int, Tensor] = {}
        for member in members:
            member.siblings = [self]

    def take(self, member: "GatedLinear", x: Tensor, plan: Plan) -> Tensor | None:
        """What `member` gives for `x`; `None` where it has to compute alone."""
        if self._x is x and plan is self._plan:
            y = self._ys.pop(id(member), None)
            if not self._ys:
                self._x = None
            return y
        if member is not self._members[0]:
            return None
        if plan is not self._plan:
            layers = self._members[0].owner
            a = [layers.arena.a[path] for path in self._paths]
            b = [layers.arena.b[path] for path in self._paths]
            self._bound = layers.form.bind_all(plan, self._paths, a, b) if plan.gates_rows else None
            self._plan = plan
        if self._bound is not None:
            self._bound.begin(x)
        ys = [one.run(x) for one in self._members]
        if self._bound is not None:
            self._bound(ys, x)
        for one, y in zip(self._members, ys, strict=True):
            one.add_shares(y, x, plan)
        self._x = x if len(ys) > 1 else None
        self._ys = {id(one): y for one, y in zip(self._members[1:], ys[1:], strict=True)}
        first: Tensor = ys[0]
        return first


class GatedLinear(nn.Module):
    """`base(x)` plus what the current plan adds. Works around any linear layer, 4-bit ones included."""

    def __init__(self, base: nn.Module, path: str, layers: AdapterLayers) -> None:
        super().__init__()
        self.base = base
        self.path = path
        # A plain list hides the owner from nn.Module, which would otherwise not mind, but also the arena's
        # tensors from `parameters()`, `to()` and state dicts: they are not weights of the model.
        self._layers = [layers]
        # Its code without the call of a module around it, which costs more than all that is done here.
        self.run = base if _has_hooks(base) else base.forward
        self._a = [layers.arena.a[path]]
        self._b = [layers.arena.b[path]]
        self._bound_plan = BARE
        self._bound: Bound | None = None
        self._shares_plan = BARE
        self._shares: Bound | None = None
        self.siblings: list[Siblings] = []

    @property
    def owner(self) -> AdapterLayers:
        """Whose plan it follows."""
        return self._layers[0]

    @property
    def weight(self) -> Tensor:
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        # Every name that is looked up here is looked up some hundred times a step, with the caches full of
        # weights: this path is kept as short as it can be (docs/log.md).
        plan = self._layers[0].current
        if self.siblings:
            found = self.siblings[0].take(self, x, plan)
            if found is not None:
                return found
        y: Tensor = self.run(x)
        if plan is not self._bound_plan:
            self._bind(plan)
        if self._bound is not None:
            self._bound(y, x)
        return y

    def add_shares(self, y: Tensor, x: Tensor, plan: Plan) -> None:
        """Add what slots add whose gates depend on the token."""
        if plan is not self._shares_plan:
            self._shares = _with_shares(None, plan.shares, self.path) if plan.shares else None
            self._shares_plan = plan
        if self._shares is not None:
            self._shares(y, x)

    def _bind(self, plan: Plan) -> None:
        form = self._layers[0].form
        self._bound = form.bind(plan, self.path, self._a[0], self._b[0]) if plan.gates_rows else None
        if plan.shares:
            self._bound = _with_shares(self._bound, plan.shares, self.path)
        self._bound_plan = plan


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)


def _with_shares(bound: Bound | None, shares: Sequence[Share], module: str) -> Bound | None:
    """What a plan's segments add at a module (`bound`) and what its shares do."""
    parts: list[tuple[Share, Adding]] = []
    for share in shares:
        adding = share.slot.bind(module)
        if adding is not None:
            parts.append((share, adding))
    if not parts:
        return bound

    def apply(y: Tensor, x: Tensor) -> None:
        if bound is not None:
            bound(y, x)
        x, y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for share, adding in parts:
            share.add_(adding, y, x)

    return apply


def _find(model: nn.Module, path: str) -> tuple[nn.Module, str, nn.Module]:
    """A module of the model, with its parent and its name there.

    Raises:
        BaseMismatchError: there is none of that path.
    """
    parent_path, _, name = path.rpartition(".")
    try:
        parent = model.get_submodule(parent_path)
        found = parent.get_submodule(name)
    except AttributeError as error:
        raise BaseMismatchError(f"the base model has no module {path!r}") from error
    return parent, name, found
