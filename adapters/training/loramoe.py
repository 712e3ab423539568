"""LoRAMoE while it trains: every projection of a feed-forward block has experts and a dense router."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from loramux.adapters.sparse.model import ExpertFactors, ExpertMixture, Kind, SparseModel
from loramux.adapters.training.compute import exact
from loramux.adapters.training.errors import OptionError
from loramux.adapters.training.factors import Factors
from loramux.adapters.training.frozen import check_targets, linears
from loramux.adapters.training.losses import RouterLog, mass_variation
from loramux.adapters.training.run import RunOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraMoeOptions(RunOptions):
    """Shape of a LoRAMoE model and how it is trained; `rank` is that of each expert (LoRAMoE §2.3)."""

    rank: int = 4
    alpha: float = 32.0
    experts: int = 6
    balance_weight: float = 0.0

    def __post_init__(self) -> None:
        RunOptions.__post_init__(self)
        if self.experts < 2:
            raise OptionError("a mixture needs at least 2 experts")
        if self.balance_weight < 0:
            raise OptionError(f"balance_weight must not be negative, got {self.balance_weight}")


class ExpertGatedLinear(nn.Module):
    """y = W₀x + Σ_e g_e · scale · B_e A_e x, g = softmax(W_g x) over all experts."""

    def __init__(self, base: nn.Linear, options: LoraMoeOptions, log: RouterLog) -> None:
        super().__init__()
        self.base = base
        self.factors = Factors(
            base.in_features,
            base.out_features,
            rank=options.rank,
            scale=options.scale,
            experts=options.experts,
            dropout=options.dropout,
        )
        start = torch.empty(options.experts, base.in_features).uniform_(-1, 1) / math.sqrt(base.in_features)
        self.router = nn.Parameter(start)
        self._log = log

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        with exact():
            logits = linear(x.float(), self.router)  # [rows, tokens, experts]
        if self.training:
            self._log.add(logits)
        gate = self.factors.per_rank(logits.softmax(-1))
        return y + self.factors.expand(self.factors.shrink(x) * gate).to(y.dtype)


class LoraMoeTrainer:
    """The modules of a LoRAMoE model for one base, its balance loss, and its result as a `SparseModel`."""

    kind = Kind.LORAMOE

    def __init__(self, model: nn.Module, options: LoraMoeOptions) -> None:
        """Make fresh modules.

        Raises:
            OptionError: the base has no feed-forward blocks with linear modules, or lacks a target.
        """
        check_targets(model, options.targets, ("mlp",))
        self.options = options
        self._log = RouterLog()
        self.linear = {
            path: ExpertGatedLinear(module, options, self._log)
            for path, module in linears(model, "mlp", options.targets).items()
        }

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What to put into the base, by path."""
        return dict(self.linear)

    def penalty(self, mask: Tensor) -> Tensor:
        """Balance loss of the forward pass that just ran; `mask [rows, width]` marks real tokens."""
        return self.options.balance_weight * mass_variation(self._log.take(), mask)

    def result(self, id: str, dtype: torch.dtype) -> SparseModel:
        """The trained model; factors in `dtype`, routers in float32. Its content hash is left empty."""
        mixtures = {
            path: ExpertMixture(
                factors=ExpertFactors(*module.factors.stacked(dtype), self.options.scale),
                router=module.router.detach().cpu().clone(),
            )
            for path, module in self.linear.items()
        }
        return SparseModel(id=id, kind=self.kind, content_hash="", linear=mixtures)
