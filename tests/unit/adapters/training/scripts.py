"""What a sparse model computes, token by token and expert by expert in float64: slow, and nothing shared."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loramux.adapters.sparse.model import ExpertMixture, FfnStrategy, MixtureFfn, RankMixture, SparseModel


def scripted(model: PreTrainedModel, sparse: SparseModel) -> PreTrainedModel:
    """A copy of the base in float64 with the sparse model's formulas in the places they belong to."""
    scripted_model = copy.deepcopy(model).double()
    for path, pair in sparse.plain.items():
        delta = pair.scale * pair.b.double() @ pair.a.double()
        scripted_model.get_submodule(path).weight.data += delta
    for path, mixture in sparse.linear.items():
        parent, _, name = path.rpartition(".")
        base = scripted_model.get_submodule(path)
        setattr(scripted_model.get_submodule(parent), name, _Linear(base, mixture))
    for path, block in sparse.ffn.items():
        parent, _, name = path.rpartition(".")
        base = scripted_model.get_submodule(path)
        setattr(scripted_model.get_submodule(parent), name, _Ffn(base, block))
    return scripted_model


def by_token(x: Tensor, function) -> Tensor:
    return torch.stack([torch.stack([function(token) for token in row]) for row in x])


class _Linear(nn.Module):
    def __init__(self, base: nn.Module, mixture: RankMixture | ExpertMixture) -> None:
        super().__init__()
        self.base, self.mixture = base, mixture

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + by_token(x, self.delta)

    def delta(self, x: Tensor) -> Tensor:
        one = self.mixture
        if isinstance(one, ExpertMixture):
            gate = torch.softmax(one.router.double() @ x, 0)
            a, b = one.factors.a.double(), one.factors.b.double()
            return sum(gate[e] * one.factors.scale * (b[e] @ (a[e] @ x)) for e in range(len(gate)))
        rank = one.a.shape[0]
        total = torch.zeros(one.b.shape[0], dtype=torch.float64)
        for expert in range(one.experts):
            if one.router is None:
                gate = torch.full((rank,), one.bypass * one.gain, dtype=torch.float64)
            else:
                rows = one.router.double()[expert * rank : (expert + 1) * rank]
                gate = torch.softmax(rows @ x / one.temperature, 0) * one.gain
            for j in range(rank):
                total += gate[j] * one.b.double()[:, j] * (one.a.double()[j] @ x) / one.experts
        return one.scale * total


class _Ffn(nn.Module):
    def __init__(self, base: nn.Module, block: MixtureFfn) -> None:
        super().__init__()
        self.base, self.block = base, block

    def forward(self, x: Tensor) -> Tensor:
        return by_token(x, self.token)

    def token(self, x: Tensor) -> Tensor:
        routing = self.block.routing
        p = torch.softmax(self.block.router.double() @ x, 0)
        if routing.strategy == FfnStrategy.SWITCH:
            best = int(p.argmax())
            return p[best] * self.expert(best, x)
        order = p.argsort(descending=True)[: routing.top_k].tolist()
        return sum(p[e] / p[order].sum() * self.expert(e, x) for e in order)

    def expert(self, expert: int, x: Tensor) -> Tensor:
        def adapted(name: str, value: Tensor) -> Tensor:
            y = getattr(self.base, name)(value)
            if name in self.block.projections:
                factors = self.block.projections[name]
                y = y + factors.scale * factors.b[expert].double() @ (factors.a[expert].double() @ value)
            return y

        if hasattr(self.base, "fc1"):
            return adapted("fc2", self.base.activation_fn(adapted("fc1", x)))
        if hasattr(self.base, "gate_up_proj"):
            gate, up = adapted("gate_up_proj", x).chunk(2)
            return adapted("down_proj", up * self.base.activation_fn(gate))
        hidden = self.base.act_fn(adapted("gate_proj", x)) * adapted("up_proj", x)
        return adapted("down_proj", hidden)
