"""The operator as its formula says, for tests."""

import torch
from torch import Tensor

from loramux.kernels.gated_lora.plan import Plan


def dense_gate(plan: Plan, tokens: int, rows: int) -> Tensor:
    """The gate of the whole batch, [tokens, rows] float32: zero where a token does not use a row."""
    gate = torch.zeros(tokens, rows)
    for segment in plan.segments:
        for (lo, hi), part in segment.slot.parts():
            gate[segment.tokens, lo:hi] = part.float().cpu()
    return gate


def gated_lora_reference(y: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    """`y + (x Aᵀ ⊙ g) B`, computed in float32, or float64 if `x` is.

    Shapes: y [T, out], x [T, in], a [R, in], b [R, out], gate [T, R]; the result has the shape and dtype of
    y.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    hidden = (x.to(wide) @ a.to(wide).T) * gate.to(wide)
    return (y.to(wide) + hidden @ b.to(wide)).to(y.dtype)
