"""An adapter's factors as leaves of autograd, at their places in the base.

Every mixture that adds deltas at a linear module is one module here, with its gate as a function of the
input; MixLoRA's blocks run the operator's reference, which says the formula and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from loramux.adapters.errors import UnsupportedAdapterError
from loramux.adapters.lora import LoraAdapter, LoraPair
from loramux.adapters.sparse.feed_forward import take_apart
from loramux.adapters.sparse.model import (
    ExpertFactors,
    ExpertMixture,
    FfnRouting,
    FfnStrategy,
    MixtureFfn,
    RankMixture,
    SparseModel,
)
from loramux.kernels.mixlora_ffn import Routes, mixlora_ffn_reference, probabilities, switch, top_k, top_p

#: The module's input [..., in] -> a factor for each of its ranks [..., R].
Gate = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Leaf:
    """The trainable factors of one linear module.

    Attributes:
        a: `[R, in]`; R are the ranks of all experts, one expert after the other.
        bt: `[R, out]`, B transposed.
        experts: how many experts share R.
    """

    a: nn.Parameter
    bt: nn.Parameter
    experts: int = 1

    @classmethod
    def of(cls, a: Tensor, b: Tensor, dtype: torch.dtype, experts: int = 1) -> Leaf:
        """Copies of `a [R, in]` and `b [out, R]`."""
        return cls(nn.Parameter(a.to(dtype).clone()), nn.Parameter(b.mT.to(dtype).contiguous()), experts)

    @property
    def numbers(self) -> int:
        return self.a.numel() + self.bt.numel()


@dataclass(frozen=True, slots=True)
class Probes:
    """What to put into a base, and the factors in it.

    Attributes:
        modules: by the path of what each replaces.
        leaves: by the path of the linear module that each adapts.
    """

    modules: dict[str, nn.Module]
    leaves: dict[str, Leaf]

    @property
    def numbers(self) -> int:
        """How many parameters are measured."""
        return sum(leaf.numbers for leaf in self.leaves.values())


class LinearProbe(nn.Module):
    """y = base(x) + scale · B (g(x) ⊙ A x); without a gate a plain LoRA."""

    def __init__(self, base: nn.Module, leaf: Leaf, scale: float, gate: Gate | None = None) -> None:
        super().__init__()
        self.base = base
        self.a, self.bt = leaf.a, leaf.bt
        self._scale = scale
        self._gate = gate

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        wide = x.to(self.a.dtype)
        z = linear(wide, self.a)
        if self._gate is not None:
            z = z * self._gate(wide)
        return y + (z @ self.bt * self._scale).to(y.dtype)


class FfnProbe(nn.Module):
    """y = Σ_e w_e FFN_e(x) around a feed-forward block of the base."""

    router: Tensor

    def __init__(
        self, base: nn.Module, path: str, mixture: MixtureFfn, leaves: dict[str, Leaf], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.base = base
        self.a = nn.ParameterDict({name: leaf.a for name, leaf in leaves.items()})
        self.bt = nn.ParameterDict({name: leaf.bt for name, leaf in leaves.items()})
        self.register_buffer("router", mixture.router.to(dtype))
        self._scales = {name: factors.scale for name, factors in mixture.projections.items()}
        self._routing = mixture.routing
        self._experts = mixture.experts
        self._ffn = take_apart(base, path, activation=mixture.activation)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        routes = _routes(linear(tokens.to(self.router.dtype), self.router), self._routing, x.shape[:-1])
        projections = {name: self._factors(name) for name in self.a}
        return mixlora_ffn_reference(tokens, self._ffn, projections, routes).view(x.shape)

    def _factors(self, name: str) -> ExpertFactors:
        a, bt = self.a[name], self.bt[name]
        shape = (self._experts, len(a) // self._experts, -1)
        return ExpertFactors(a.reshape(shape), bt.reshape(shape).mT, self._scales[name])


def make_probes(
    model: nn.Module, adapter: LoraAdapter | SparseModel, dtype: torch.dtype = torch.float32
) -> Probes:
    """The factors of an adapter as leaves in `dtype`, its routers as they are.

    Raises:
        UnsupportedAdapterError: the base has no such module.
        BaseMismatchError: its feed-forward block is of no known form.
    """
    modules: dict[str, nn.Module] = {}
    leaves: dict[str, Leaf] = {}
    pairs = adapter.pairs if isinstance(adapter, LoraAdapter) else adapter.plain
    for path, pair in pairs.items():
        leaves[path] = _leaf_of(pair, dtype)
        modules[path] = LinearProbe(_at(model, path), leaves[path], pair.scale)
    if isinstance(adapter, LoraAdapter):
        return Probes(modules, leaves)
    for path, mixture in adapter.linear.items():
        if isinstance(mixture, RankMixture):
            leaves[path] = Leaf.of(mixture.a, mixture.b, dtype)
            gate, scale = rank_gate(mixture, dtype), mixture.scale
        else:
            leaves[path] = _leaf_of(mixture.factors, dtype)
            gate, scale = expert_gate(mixture, dtype), mixture.factors.scale
        modules[path] = LinearProbe(_at(model, path), leaves[path], scale, gate)
    for path, block in adapter.ffn.items():
        own = {name: _leaf_of(factors, dtype) for name, factors in block.projections.items()}
        leaves |= {f"{path}.{name}": leaf for name, leaf in own.items()}
        modules[path] = FfnProbe(_at(model, path), path, block, own, dtype)
    return Probes(modules, leaves)


def rank_gate(mixture: RankMixture, dtype: torch.dtype) -> Gate:
    """LoRACoE's: `gain · mean_i softmax_rank(W_i x / temperature)`; a constant without a router."""
    if mixture.router is None:
        constant = torch.tensor(mixture.gain * mixture.bypass, dtype=dtype)
        return lambda x: constant.to(x.device)
    router = mixture.router.to(dtype)

    def gate(x: Tensor) -> Tensor:
        logits = linear(x, router.to(x.device)) / mixture.temperature
        by_expert = logits.reshape(*x.shape[:-1], mixture.experts, -1)
        return by_expert.softmax(-1).mean(-2) * mixture.gain

    return gate


def expert_gate(mixture: ExpertMixture, dtype: torch.dtype) -> Gate:
    """LoRAMoE's and MoLA's: the softmax over all or the best experts, the same for all ranks of an expert."""
    router = mixture.router.to(dtype)
    rank, k = mixture.factors.rank, mixture.top_k

    def gate(x: Tensor) -> Tensor:
        logits = linear(x, router.to(x.device))
        if k is None:
            shares = logits.softmax(-1)
        else:
            best, at = logits.topk(min(k, logits.shape[-1]), dim=-1)
            shares = torch.zeros_like(logits).scatter(-1, at, best.softmax(-1))
        return shares.repeat_interleave(rank, dim=-1)

    return gate


def _leaf_of(factors: LoraPair | ExpertFactors, dtype: torch.dtype) -> Leaf:
    if isinstance(factors, ExpertFactors):
        a = factors.a.flatten(0, 1)
        b = factors.b.permute(1, 0, 2).flatten(1, 2)
        return Leaf.of(a, b, dtype, factors.experts)
    return Leaf.of(factors.a, factors.b, dtype)


def _routes(logits: Tensor, how: FfnRouting, shape: torch.Size) -> Routes:
    p = probabilities(logits)
    if how.strategy is FfnStrategy.TOP_K:
        return top_k(p, how.top_k)
    if how.strategy is FfnStrategy.TOP_P:
        return top_p(p, how.top_p, how.temperature)
    return switch(p, how.capacity, [shape[-1]] * (shape.numel() // shape[-1]))


def _at(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedAdapterError(f"the base has no module {path}") from error
