"""A base's feed-forward block with MixLoRA models beside it."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from loramux.adapters.sparse.feed_forward import PlacedFfn, take_apart
from loramux.adapters.sparse.slot import SparseSlot
from loramux.kernels.gated_lora import BARE, Plan, Share
from loramux.kernels.mixlora_ffn import Ffn, finish, mix, mixlora_ffn


class Planned(Protocol):
    """Whose plan a layer follows."""

    plan: Plan


class _Work(NamedTuple):
    """One MixLoRA model in this step, with the base's projections as its experts use them: as the layers of
    the batch (`joint`) and without what stands around them (`alone`)."""

    share: Share
    placed: PlacedFfn
    joint: Ffn
    alone: Ffn


class FeedForwardLayer(nn.Module):
    """The base's own block, except for tokens of MixLoRA models.

    A batch without such tokens runs the block's own code. One with nothing else runs the operator, some
    tokens at a time. A mixed one runs every projection once for all tokens, through the layers around it, so
    that the weights are read once: between the projections the MixLoRA tokens get their experts' hidden
    states, the others the block's own.
    """

    def __init__(self, base: nn.Module, path: str, owner: Planned) -> None:
        super().__init__()
        self.base = base
        self.path = path
        self._owner = [owner]
        self._own: Ffn | None = None
        self._bound_plan = BARE
        self._work: tuple[_Work, ...] = ()
        self._pure_rows = -1

    def forward(self, x: Tensor) -> Tensor:
        plan = self._owner[0].plan
        if plan is not self._bound_plan:
            self._bind(plan)
        if not self._work:
            y: Tensor = self.base(x)
            return y
        rows = x.reshape(-1, x.shape[-1])
        run = self._pure if len(rows) == self._pure_rows else self._mixed
        return run(rows).view(x.shape)

    def _bind(self, plan: Plan) -> None:
        work = []
        for share in plan.shares:
            if isinstance(share.slot, SparseSlot) and self.path in share.slot.blocks:
                placed = share.slot.blocks[self.path]
                how = placed.activation
                joint = take_apart(self.base, self.path, activation=how)
                alone = take_apart(self.base, self.path, activation=how, bare=True)
                work.append(_Work(share, placed, joint, alone))
        # Not before: only now the layers that the plan needs stand in the block.
        self._own = take_apart(self.base, self.path)
        inside = f"{self.path}."
        self._work = tuple(work)
        adds_inside = any(module.startswith(inside) for one in work for module in one.share.slot.modules)
        rows = sum(sum(one.share.lengths) for one in work)
        self._pure_rows = -1 if adds_inside else rows  # a batch of this many rows holds nothing else
        self._bound_plan = plan

    def _pure(self, x: Tensor) -> Tensor:
        y: Tensor | None = None
        for share, placed, _, ffn in self._work:
            mine = share.take(x)
            out = mixlora_ffn(mine, ffn, placed.experts, placed.route(mine, share.lengths))
            if len(self._work) == 1:
                return out
            y = torch.empty_like(x) if y is None else y
            share.put(y, out)
        assert y is not None  # called only where there is work
        return y

    def _mixed(self, x: Tensor) -> Tensor:
        assert self._own is not None  # made when the plan was bound
        first = {name: projection(x) for name, projection in self._own.first.items()}
        hidden = self._own.activate(list(first.values()))
        begun = []
        for share, placed, ffn, _ in self._work:
            mine = share.take(x)
            routes = placed.route(mine, share.lengths)
            parts = {name: share.take(part) for name, part in first.items()}
            mixed = mix(mine, parts, ffn, placed.experts, routes)
            share.put(hidden, mixed.hidden)
            begun.append((mine, routes, mixed))
        del first
        y = self._own.last[1](hidden)
        for (share, placed, ffn, _), (mine, routes, mixed) in zip(self._work, begun, strict=True):
            share.put(y, finish(mine, share.take(y), mixed, ffn, placed.experts, routes))
        return y
