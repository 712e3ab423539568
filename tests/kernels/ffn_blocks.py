"""Random feed-forward blocks of every architecture, and random experts for them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loramux.kernels.mixlora_ffn import Ffn, Gated, Halves, Plain

#: gate and up apart; both in one projection; a single projection with biases (phi); gate and up with biases.
KINDS = ["gated", "halves", "plain", "gated with biases"]


@dataclass(frozen=True, eq=False)
class Stack:
    """The experts of one projection."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class RandomBlock:
    ffn: Ffn
    linears: dict[str, nn.Linear]
    stacks: dict[str, Stack]


def random_block(
    kind: str,
    hidden: int,
    width: int,
    experts: int,
    *,
    dtype: torch.dtype,
    ranks: Sequence[int] = (4, 7, 5),
    leave_out: Sequence[str] = (),
) -> RandomBlock:
    biased = kind in ("plain", "gated with biases")

    def layer(n_in: int, n_out: int) -> nn.Linear:
        made = nn.Linear(n_in, n_out, bias=biased, dtype=dtype).requires_grad_(False)
        made.weight.data = (torch.randn(n_out, n_in) / n_in**0.5).to(dtype)
        return made

    if kind == "plain":
        linears = {"fc1": layer(hidden, width), "fc2": layer(width, hidden)}
        ffn = Ffn({"fc1": linears["fc1"]}, ("fc2", linears["fc2"]), Plain(nn.GELU()), linears["fc2"].bias)
    elif kind == "halves":
        linears = {"gate_up_proj": layer(hidden, 2 * width), "down_proj": layer(width, hidden)}
        first = {"gate_up_proj": linears["gate_up_proj"]}
        ffn = Ffn(first, ("down_proj", linears["down_proj"]), Halves(nn.SiLU()))
    else:
        linears = {
            "gate_proj": layer(hidden, width),
            "up_proj": layer(hidden, width),
            "down_proj": layer(width, hidden),
        }
        first = {name: linears[name] for name in ("gate_proj", "up_proj")}
        last = linears["down_proj"]
        ffn = Ffn(first, ("down_proj", last), Gated(nn.SiLU()), last.bias if biased else None)
    stacks = {
        name: Stack(
            (torch.randn(experts, rank, linear.in_features) / linear.in_features**0.5).to(dtype),
            torch.randn(experts, linear.out_features, rank).to(dtype),
            0.5,
        )
        for (name, linear), rank in zip(linears.items(), ranks, strict=False)
        if name not in leave_out
    }
    return RandomBlock(ffn, linears, stacks)
