"""Trainable LoRA factors of one linear module, for one expert or several side by side."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from loramux.adapters.training.compute import wide


class Factors(nn.Module):
    """delta_e(x) = scale · B_e A_e x for every expert e, with all ranks in one matrix.

    A starts uniform in ±1/sqrt(in) (what PEFT's Kaiming start comes to), B at zero, so the first delta is
    zero. Everything is float32, whatever the base is in.

    Attributes:
        a: `[experts * rank, in]`; row e * rank + j belongs to rank j of expert e.
        bt: `[experts * rank, out]`, B transposed, rows as in `a`.
    """

    def __init__(
        self, n_in: int, n_out: int, *, rank: int, scale: float, experts: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.experts = experts
        self.rank = rank
        self.scale = scale
        self.a = nn.Parameter(torch.empty(experts * rank, n_in).uniform_(-1, 1) / math.sqrt(n_in))
        self.bt = nn.Parameter(torch.zeros(experts * rank, n_out))
        self.dropout = nn.Dropout(dropout)

    def shrink(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., experts * rank]`."""
        return linear(self.dropout(wide(x)), self.a)

    def expand(self, z: Tensor) -> Tensor:
        """`[..., experts * rank]`, gated -> `[..., out]`."""
        return (z * self.scale) @ self.bt

    def per_rank(self, gate: Tensor) -> Tensor:
        """A gate per expert, `[..., experts]`, as one per rank, `[..., experts * rank]`."""
        return gate.repeat_interleave(self.rank, dim=-1)

    @torch.no_grad()
    def round_to(self, dtype: torch.dtype) -> None:
        """Keep only what `dtype` can hold, so that what is measured is what will be written."""
        for parameter in (self.a, self.bt):
            parameter.copy_(parameter.to(dtype))

    def stacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Copies as `a [experts, rank, in]` and `b [experts, out, rank]` on the host."""
        shape = (self.experts, self.rank, -1)
        a = self.a.detach().to("cpu", dtype).reshape(shape)
        b = self.bt.detach().to("cpu", dtype).reshape(shape).transpose(1, 2)
        return a.clone(), b.contiguous()


class LoraLinear(nn.Module):
    """A frozen linear module and one LoRA that every token uses."""

    def __init__(self, base: nn.Module, factors: Factors) -> None:
        super().__init__()
        self.base = base
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + self.factors.expand(self.factors.shrink(x)).to(y.dtype)
