"""The published formulas as plain scripts, put into a float64 copy of a base."""

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loramux.adapters.lora import LoraPair
from loramux.adapters.sparse.model import (
    ExpertMixture,
    FfnStrategy,
    MixtureFfn,
    RankMixture,
    SparseModel,
)

Script = Callable[[nn.Module, Tensor], Tensor]


class Scripted(nn.Module):
    """A module whose forward pass is a script over the rows of its input."""

    def __init__(self, inner: nn.Module, script: Script) -> None:
        super().__init__()
        self.inner = inner
        self.script = script

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return torch.stack([self.script(self.inner, row) for row in rows]).view(*x.shape[:-1], -1)


def scripted(model: PreTrainedModel, sparse: SparseModel) -> PreTrainedModel:
    """A float64 copy of the base that computes the sparse model token by token."""
    changed = copy.deepcopy(model).double()
    scripts: dict[str, Script] = {path: plain(pair) for path, pair in sparse.plain.items()}
    for path, mixture in sparse.linear.items():
        scripts[path] = ranks(mixture) if isinstance(mixture, RankMixture) else experts(mixture)
    scripts |= {path: block(mixture) for path, mixture in sparse.ffn.items()}
    _put(changed, scripts)
    return changed


def _put(model: nn.Module, scripts: Mapping[str, Script]) -> None:
    for path, script in scripts.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Scripted(model.get_submodule(path), script))


def softmax(values: list[float]) -> list[float]:
    exps = [math.exp(value - max(values)) for value in values]
    return [value / sum(exps) for value in exps]


def plain(pair: LoraPair) -> Script:
    def run(linear: nn.Module, x: Tensor) -> Tensor:
        return linear(x) + pair.scale * (pair.b.double() @ (pair.a.double() @ x))

    return run


def ranks(mixture: RankMixture) -> Script:
    """LoRACoE: a double loop over experts and ranks."""
    rank = mixture.a.shape[0]

    def run(linear: nn.Module, x: Tensor) -> Tensor:
        y = linear(x)
        low = mixture.a.double() @ x
        for i in range(mixture.experts):
            if mixture.router is None:
                gates = [mixture.bypass] * rank
            else:
                rows = mixture.router[i * rank : (i + 1) * rank].double()
                gates = softmax((rows @ x / mixture.temperature).tolist())
            for j in range(rank):
                factor = mixture.scale * mixture.gain * gates[j] / mixture.experts
                y = y + factor * low[j] * mixture.b[:, j].double()
        return y

    return run


def experts(mixture: ExpertMixture) -> Script:
    """LoRAMoE and MoLA: a loop over the experts that take part."""

    def run(linear: nn.Module, x: Tensor) -> Tensor:
        y = linear(x)
        p = softmax((mixture.router.double() @ x).tolist())
        kept = sorted(range(len(p)), key=lambda e: -p[e])[: mixture.top_k]
        for e in kept:
            delta = mixture.factors.b[e].double() @ (mixture.factors.a[e].double() @ x)
            y = y + mixture.factors.scale * p[e] / sum(p[i] for i in kept) * delta
        return y

    return run


def block(mixture: MixtureFfn) -> Script:
    """MixLoRA: each expert is a feed-forward block with weights of its own, merged out of base and deltas."""

    def run(ffn: nn.Module, x: Tensor) -> Tensor:
        p = softmax((mixture.router.double() @ x).tolist())
        total: Tensor = torch.zeros_like(x)
        for e, weight in spend(mixture, p).items():
            total = total + weight * run_expert(ffn, mixture, e, x)
        return total

    return run


def spend(mixture: MixtureFfn, p: list[float]) -> dict[int, float]:
    """Expert -> weight of one token; switch without a capacity."""
    order = sorted(range(len(p)), key=lambda e: -p[e])
    how = mixture.routing
    if how.strategy is FfnStrategy.SWITCH:
        return {order[0]: p[order[0]]}
    if how.strategy is FfnStrategy.TOP_K:
        kept = order[: how.top_k]
        return {e: p[e] / sum(p[i] for i in kept) for e in kept}
    chosen: dict[int, float] = {}
    for e in order:
        chosen[e] = p[e]
        if sum(chosen.values()) > how.top_p:
            break
    return chosen


def run_expert(ffn: nn.Module, mixture: MixtureFfn, expert: int, x: Tensor) -> Tensor:
    def project(name: str, z: Tensor) -> Tensor:
        linear = ffn.get_submodule(name)
        weight = linear.weight
        factors = mixture.projections.get(name)
        if factors is not None:
            weight = weight + factors.scale * factors.b[expert].double() @ factors.a[expert].double()
        return weight @ z if linear.bias is None else weight @ z + linear.bias

    activation = getattr(ffn, "act_fn", None) or ffn.activation_fn
    if hasattr(ffn, "fc1"):
        return project("fc2", activation(project("fc1", x)))
    if hasattr(ffn, "gate_up_proj"):
        gate, up = project("gate_up_proj", x).chunk(2)
    else:
        gate, up = project("gate_proj", x), project("up_proj", x)
    return project("down_proj", activation(gate) * up)
