"""Rank concatenation: sum of w_i s_i B_i A_i = [B_1 .. B_m] [c_1 A_1; ..; c_m A_m], without any loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loramux.adapters.lora import FactorStack
from loramux.adapters.merge.joint import Block, JointStack, column
from loramux.adapters.merge.memory import empty


def concatenate(joint: JointStack) -> FactorStack:
    """The exact weighted sum, of rank sum r_i.

    The largest coefficient of a module becomes its scale and only the ratios to it are multiplied into B, so
    the strongest adapter keeps its bits in any type, and an adapter alone is returned as views, not copies.
    """
    if len(joint.blocks) == 1:
        block = joint.blocks[0]
        return FactorStack(joint.modules, block.a.to(joint.dtype), block.bt.to(joint.dtype), block.coefs)
    first, (out_features, in_features) = joint.blocks[0], joint.shape
    a = empty((len(joint.modules), joint.rank, in_features), joint.dtype, first.a.device)
    bt = empty((len(joint.modules), joint.rank, out_features), joint.dtype, first.bt.device)
    scales = _largest(joint.blocks)
    start = 0
    for block in joint.blocks:
        ranks = slice(start, start + block.rank)
        a[:, ranks].copy_(block.a)
        ratios = [coef / scale if scale else 0.0 for coef, scale in zip(block.coefs, scales, strict=True)]
        _multiply(block.bt, ratios, bt[:, ranks])
        start = ranks.stop
    return FactorStack(joint.modules, a, bt, scales)


def _largest(blocks: Sequence[Block]) -> tuple[float, ...]:
    return tuple(max(coefs, key=abs) for coefs in zip(*(block.coefs for block in blocks), strict=True))


def _multiply(source: Tensor, ratios: Sequence[float], target: Tensor) -> None:
    """target = ratio * source per module, rounded once; one number for all modules is the usual case."""
    if all(ratio == 1.0 for ratio in ratios):
        target.copy_(source)
    elif all(ratio == ratios[0] for ratio in ratios) and source.dtype == target.dtype:
        torch.mul(source, ratios[0], out=target)
    else:
        target.copy_(source.float() * column(ratios, source.float()))
