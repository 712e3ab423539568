"""MixLoRA while it trains: a router and LoRA experts inside every feed-forward block, LoRA on attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, one_hot

from loramux.adapters.lora import LoraPair
from loramux.adapters.sparse.model import (
    ExpertFactors,
    FfnRouting,
    FfnStrategy,
    Kind,
    MixtureFfn,
    SparseModel,
)
from loramux.adapters.training.compute import exact, wide
from loramux.adapters.training.errors import OptionError
from loramux.adapters.training.factors import Factors, LoraLinear
from loramux.adapters.training.frozen import blocks, check_targets, linears
from loramux.adapters.training.losses import (
    RouterLog,
    real_tokens,
    switch_balance,
    top_k_balance,
    z_loss,
)
from loramux.adapters.training.run import RunOptions

_LAST = ("down_proj", "fc2")


@dataclass(frozen=True, slots=True, kw_only=True)
class MixLoraOptions(RunOptions):
    """Shape of a MixLoRA model and how it is trained (MixLoRA §3; defaults of its authors' code).

    `strategy` is top_k or switch. `None` stands for what fits the strategy: `router_init` .02 (switch 1.0),
    `jitter` 0 (switch .01, on the router's input), `z_weight` 0 (switch .001). `capacity` is how many tokens
    of a sequence an expert takes under switch; the others pass by, scaled by their probability.
    """

    dropout: float = 0.05
    experts: int = 8
    strategy: FfnStrategy = FfnStrategy.TOP_K
    top_k: int = 2
    capacity: int = 32
    balance_weight: float = 0.01
    z_weight: float | None = None
    router_init: float | None = None
    jitter: float | None = None

    def __post_init__(self) -> None:
        RunOptions.__post_init__(self)
        if self.strategy not in (FfnStrategy.TOP_K, FfnStrategy.SWITCH):
            raise OptionError(
                f"a router cannot be trained with strategy {self.strategy}; choose top_k or switch"
            )
        if self.experts < 2:
            raise OptionError("a mixture needs at least 2 experts")
        if self.strategy == FfnStrategy.TOP_K and not 2 <= self.top_k <= self.experts:
            raise OptionError(
                f"top_k must be 2 to experts ({self.experts}), got {self.top_k}; with one choice the "
                "renormalised weight is always 1 and the router learns nothing: use switch"
            )
        if self.capacity < 1 or self.balance_weight < 0 or (self.z_weight or 0) < 0 or (self.jitter or 0) < 0:
            raise OptionError("capacity must be positive; balance_weight, z_weight and jitter not negative")

    def or_switch(self, given: float | None, top_k: float, switch: float) -> float:
        """A value as given, or the default of the strategy."""
        if given is not None:
            return given
        return switch if self.strategy == FfnStrategy.SWITCH else top_k


class MixLoraFfn(nn.Module):
    """y = Σ_e w_e FFN_e(x) around a frozen block; every projection of FFN_e is W₀ + scale · B_e A_e.

    The base projections run once per token: gate and up because the experts share their input, down because
    Σ_e w_e W₂ h_e = W₂ Σ_e w_e h_e. A choice of experts is a gate of ones and zeros over all ranks, which
    makes every projection one product, whichever expert a token went to.
    """

    def __init__(
        self, base: nn.Module, factors: Mapping[str, Factors], options: MixLoraOptions, log: RouterLog
    ) -> None:
        super().__init__()
        own = {name: child for name, child in base.named_children() if isinstance(child, nn.Linear)}
        self.base = base
        self.last = next(name for name in own if name in _LAST)
        self.first = [name for name in own if name != self.last]
        self.factors = nn.ModuleDict(factors)
        self.options = options
        self.jitter = options.or_switch(options.jitter, 0.0, 0.01)
        self._log = log
        std = options.or_switch(options.router_init, 0.02, 1.0)
        self.router = nn.Parameter(torch.randn(options.experts, own[self.first[0]].in_features) * std)

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, tokens, hidden]` -> the same shape."""
        routed = x.float()
        if self.training and self.jitter:
            routed = routed * torch.empty_like(routed).uniform_(1 - self.jitter, 1 + self.jitter)
        with exact():
            logits = linear(routed, self.router)  # [rows, tokens, experts]
        if self.training:
            self._log.add(logits)
        probabilities = logits.softmax(-1)
        if self.options.strategy == FfnStrategy.SWITCH:
            return self._switch(x, probabilities)
        weights, chosen = probabilities.topk(self.options.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        return self._mixture(x, one_hot(chosen, self.options.experts).movedim(-2, 0), weights.movedim(-1, 0))

    def _switch(self, x: Tensor, probabilities: Tensor) -> Tensor:
        top, chosen = probabilities.max(-1)  # [rows, tokens]
        choice = one_hot(chosen, self.options.experts)
        place = (choice.cumsum(1) * choice).sum(-1)
        kept = place <= self.options.capacity if self.training else torch.ones_like(place, dtype=torch.bool)
        y = self._mixture(x, choice[None], torch.ones_like(top)[None])
        return (top[..., None] * torch.where(kept[..., None], y, x)).to(x.dtype)

    def _mixture(self, x: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        """Choices `[k, rows, tokens, experts]` of ones and zeros, weights `[k, rows, tokens]` of sum 1."""
        values = {name: self._first(name, x, choices) for name in self.first}
        hidden = self._activate(values)  # [k or 1, rows, tokens, ffn]
        weighted = weights[..., None].to(hidden.dtype) * hidden
        y: Tensor = self.base.get_submodule(self.last)(reduce(torch.add, weighted.unbind(0)).to(x.dtype))
        if self.last in self.factors:
            factors = self._of(self.last)
            z = (factors.shrink(hidden) * factors.per_rank(choices * weights[..., None])).sum(0)
            y = y + factors.expand(z).to(y.dtype)
        return y

    def _first(self, name: str, x: Tensor, choices: Tensor) -> Tensor:
        y: Tensor = wide(self.base.get_submodule(name)(x))[None]
        if name not in self.factors:
            return y
        factors = self._of(name)
        return y + factors.expand(factors.shrink(x)[None] * factors.per_rank(choices))

    def _activate(self, values: Mapping[str, Tensor]) -> Tensor:
        act: Any = getattr(self.base, "act_fn", None) or self.base.activation_fn
        if "fc1" in values:
            activated: Tensor = act(values["fc1"])
            return activated
        if "gate_up_proj" in values:
            gate, up = values["gate_up_proj"].chunk(2, dim=-1)
        else:
            gate, up = values["gate_proj"], values["up_proj"]
        product: Tensor = act(gate) * up
        return product

    def _of(self, name: str) -> Factors:
        factors = self.factors[name]
        assert isinstance(factors, Factors)
        return factors


class MixLoraTrainer:
    """The modules of a MixLoRA model for one base, its extra loss, and its result as a `SparseModel`."""

    kind = Kind.MIXLORA

    def __init__(self, model: nn.Module, options: MixLoraOptions) -> None:
        """Make fresh modules.

        Raises:
            OptionError: the base has no such blocks, or lacks a target.
        """
        check_targets(model, options.targets, ("self_attn", "mlp"))
        self.options = options
        self._log = RouterLog()
        self.plain = {
            path: LoraLinear(module, self._factors(module, experts=1))
            for path, module in linears(model, "self_attn", options.targets).items()
        }
        self.ffn = {path: self._block(block) for path, block in blocks(model, "mlp").items()}

    def _factors(self, module: nn.Linear, experts: int) -> Factors:
        options = self.options
        return Factors(
            module.in_features,
            module.out_features,
            rank=options.rank,
            scale=options.scale,
            experts=experts,
            dropout=options.dropout,
        )

    def _block(self, block: nn.Module) -> MixLoraFfn:
        targets = self.options.targets
        factors = {
            name: self._factors(child, self.options.experts)
            for name, child in block.named_children()
            if isinstance(child, nn.Linear) and (targets is None or name in targets)
        }
        return MixLoraFfn(block, factors, self.options, self._log)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What to put into the base, by path."""
        return {**self.plain, **self.ffn}

    def penalty(self, mask: Tensor) -> Tensor:
        """Balance and z-loss of the forward pass that just ran; `mask [rows, width]` marks real tokens."""
        options = self.options
        logits = real_tokens(self._log.take(), mask)
        if options.strategy == FfnStrategy.SWITCH:
            balance = switch_balance(logits)
        else:
            balance = top_k_balance(logits, options.top_k)
        loss = options.balance_weight * balance
        z_weight = options.or_switch(options.z_weight, 0.0, 0.001)
        return loss + z_weight * z_loss(logits) if z_weight else loss

    def result(self, id: str, dtype: torch.dtype) -> SparseModel:
        """The trained model; factors in `dtype`, routers in float32. Its content hash is left empty."""
        options = self.options
        plain = {}
        for path, lora in self.plain.items():
            a, b = lora.factors.stacked(dtype)
            plain[path] = LoraPair(a[0], b[0], options.scale)
        routing = FfnRouting(strategy=options.strategy, top_k=options.top_k)
        ffn = {
            path: MixtureFfn(
                router=block.router.detach().cpu().clone(),
                projections={
                    name: ExpertFactors(*block._of(name).stacked(dtype), options.scale)
                    for name in block.factors
                },
                routing=routing,
            )
            for path, block in self.ffn.items()
        }
        summary = {"expert_capacity": options.capacity} if options.strategy == FfnStrategy.SWITCH else {}
        return SparseModel(id=id, kind=self.kind, content_hash="", plain=plain, ffn=ffn, summary=summary)
