"""LoRACoE while it trains: the ranks of one LoRA gated token by token, after a warm-up without the gate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from loramux.adapters.sparse.model import Kind, RankMixture, SparseModel
from loramux.adapters.training.compute import exact
from loramux.adapters.training.errors import OptionError
from loramux.adapters.training.factors import Factors
from loramux.adapters.training.frozen import check_targets, linears
from loramux.adapters.training.run import RunOptions

_ROUTER_STD = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraCoeOptions(RunOptions):
    """Shape of a LoRACoE model and how it is trained (LoRACoE §3).

    The first `warmup` of the run trains a plain LoRA at `rate`; the rest trains factors and routers together
    at `joint_rate`, by default a quarter of it, as in the paper (2e-4 and 5e-5).

    `gate_gain` multiplies the gated delta. A softmax over the rank sums to 1, so a fresh router leaves 1/rank
    of what the warm-up learnt: `rank` makes up for it, `none` is the paper's formula to the letter.
    """

    experts: int = 2
    warmup: float = 0.5
    joint_rate: float | None = None
    gate_gain: str | float = "rank"

    def __post_init__(self) -> None:
        RunOptions.__post_init__(self)
        if self.experts < 1:
            raise OptionError(f"experts must be positive, got {self.experts}")
        if not 0.0 <= self.warmup < 1.0:
            raise OptionError(f"warmup must be in [0, 1), got {self.warmup}")
        if self.joint_rate is not None and not self.joint_rate > 0:
            raise OptionError(f"joint_rate must be positive, got {self.joint_rate}")
        if isinstance(self.gate_gain, str) and self.gate_gain not in ("rank", "none"):
            raise OptionError(f"gate_gain must be rank, none or a number, got {self.gate_gain!r}")
        if not isinstance(self.gate_gain, str) and not self.gate_gain > 0:
            raise OptionError(f"gate_gain must be positive, got {self.gate_gain}")

    @property
    def gain(self) -> float:
        """`gate_gain` as a number."""
        if self.gate_gain == "rank":
            return float(self.rank)
        return 1.0 if isinstance(self.gate_gain, str) else float(self.gate_gain)


class RankGatedLinear(nn.Module):
    """y = W₀x + scale · gain · B(ḡ ⊙ Ax), ḡ = mean_i softmax_rank(W_i x); without its gate a plain LoRA."""

    def __init__(self, base: nn.Linear, options: LoraCoeOptions) -> None:
        super().__init__()
        self.base = base
        self.experts = options.experts
        self.gain = options.gain
        self.gated = False
        self.factors = Factors(
            base.in_features,
            base.out_features,
            rank=options.rank,
            scale=options.scale,
            dropout=options.dropout,
        )
        # Small, so that a fresh gate is nearly uniform; not zero, or all experts would stay equal.
        self.router = nn.Parameter(
            torch.randn(options.experts * options.rank, base.in_features) * _ROUTER_STD
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        z = self.factors.shrink(x)  # [..., rank]
        if self.gated:
            with exact():
                logits = linear(x.float(), self.router).reshape(
                    *z.shape[:-1], self.experts, -1
                )  # [..., E, rank]
            z = z * (logits.softmax(-1).mean(-2) * self.gain)
        return y + self.factors.expand(z).to(y.dtype)


class LoraCoeTrainer:
    """The modules of a LoRACoE model for one base, and its result as a `SparseModel`."""

    kind = Kind.LORACOE
    penalty = None

    def __init__(self, model: nn.Module, options: LoraCoeOptions) -> None:
        """Make fresh modules, gates off.

        Raises:
            OptionError: the base has no linear modules in its layers, or lacks a target.
        """
        check_targets(model, options.targets, ("self_attn", "mlp"))
        self.options = options
        self.linear = {
            path: RankGatedLinear(module, options)
            for kind in ("self_attn", "mlp")
            for path, module in linears(model, kind, options.targets).items()
        }

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What to put into the base, by path."""
        return dict(self.linear)

    def gate(self, on: bool) -> None:
        """Whether routers take part, and learn."""
        for module in self.linear.values():
            module.gated = on
            module.router.requires_grad_(on)

    def result(self, id: str, dtype: torch.dtype) -> SparseModel:
        """The model as trained so far: no routers while gates are off. The content hash is empty."""
        linear_modules = {}
        for path, module in self.linear.items():
            a, b = module.factors.stacked(dtype)
            linear_modules[path] = RankMixture(
                a=a[0],
                b=b[0],
                scale=self.options.scale,
                router=module.router.detach().cpu().clone() if module.gated else None,
                experts=self.options.experts,
                # The warm-up trained without gate and gain, and its checkpoint must say the same.
                gain=self.options.gain if module.gated else 1.0,
                bypass=1.0 / self.options.rank if module.gated else 1.0,
            )
        return SparseModel(id=id, kind=self.kind, content_hash="", linear=linear_modules)
