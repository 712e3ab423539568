"""How far a merge is from the exact weighted sum, from the factors alone.

For M = sum_k b_k a_k^T the inner product <M, M'> in the Frobenius sense is the sum over all entries of
(A A'^T) * (B^T B'): Gram matrices of rank size, never the dense product.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from loramux.adapters.lora import FactorStack
from loramux.adapters.merge.joint import JointStack, column


def relative_error(joints: Iterable[JointStack], merged: Iterable[FactorStack]) -> float:
    """Frobenius norm of (merged - exact) over that of exact, all modules taken together.

    Works on the factors as stored, so rounding to their type counts. In float64; the difference of squares
    leaves a floor of about 1e-8, below which the result is noise or 0.

    Args:
        joints: the exact sum.
        merged: results for the same modules, in the same order.

    Returns:
        At least 0; infinity if the exact sum is zero and the merge is not.
    """
    difference = reference = 0.0
    for joint, stack in zip(joints, merged, strict=True):
        for rows in joint.chunks():
            a, bt = joint.stacked(rows)
            merged_a = stack.a[rows].double()
            merged_bt = stack.bt[rows].double() * column(stack.scales[rows], a)
            exact = inner(a, bt, a, bt)
            reference += exact
            difference += exact - 2 * inner(a, bt, merged_a, merged_bt)
            difference += inner(merged_a, merged_bt, merged_a, merged_bt)
    if difference <= 0.0:
        return 0.0
    return math.sqrt(difference / reference) if reference > 0.0 else math.inf


def inner(a: Tensor, bt: Tensor, other_a: Tensor, other_bt: Tensor) -> float:
    """Frobenius inner product of two stacks of products B A, summed over modules.

    Args:
        a, bt: `[modules, rank, in]` and `[modules, rank, out]`.
        other_a, other_bt: the same with any other rank.
    """
    return float(((a @ other_a.mT) * (bt @ other_bt.mT)).sum())
