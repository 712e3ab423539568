"""The best approximation of the exact sum by a given rank, from matrices of rank size only.

With A = L Q (rows of Q orthonormal) the sum is M = B A = (B L) Q, so its right singular vectors are V^T Q and
its squared singular values the eigenvalues of (B L)^T (B L) = L^T (B^T B) L = V S^2 V^T. L comes from the
Gram matrix A A^T. Everything of size in x out is avoided (Eckart-Young 1936 gives the optimum).
"""

from __future__ import annotations

import torch
from torch import Tensor

from loramux.adapters.lora import FactorStack
from loramux.adapters.merge.exact import concatenate
from loramux.adapters.merge.joint import JointStack
from loramux.adapters.merge.memory import empty

_PIVOT_FLOOR = 1e-4
"""Smallest Cholesky pivot, relative to rows of length 1, at which A counts as well conditioned."""

_NULL_SHARE = 1e-14
"""Eigenvalues of a Gram matrix below this share of the largest are noise in float64."""


def truncate(joint: JointStack, rank: int) -> FactorStack:
    """Merge to at most `rank`; modules whose exact sum is no larger are concatenated instead.

    The singular values are split evenly between the factors, so that neither leaves the range of float16.
    """
    if joint.rank <= rank:
        return concatenate(joint)
    count, (out_features, in_features) = len(joint.modules), joint.shape
    a = empty((count, rank, in_features), joint.dtype, joint.blocks[0].a.device)
    bt = empty((count, rank, out_features), joint.dtype, joint.blocks[0].bt.device)
    for rows in joint.chunks():
        whole_a, whole_bt = joint.stacked(rows)
        left, right = _projections(whole_a, whole_bt, rank)
        a[rows] = right @ whole_a
        bt[rows] = left @ whole_bt
    return FactorStack(joint.modules, a, bt, (1.0,) * count)


def _projections(a: Tensor, bt: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Small matrices that turn stacked factors into truncated ones.

    Args:
        a, bt: `[modules, R, in]` and `[modules, R, out]`, float64.
        rank: r < R.

    Returns:
        left and right, both `[modules, r, R]`: B'^T = left @ bt, A' = right @ a.
    """
    lengths = torch.linalg.vector_norm(a, dim=2)
    lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    # Rows of length 1: how hard A is to orthogonalise must not depend on how an adapter shares out its norm.
    gram_a = (a @ a.mT) / (lengths[:, :, None] * lengths[:, None, :])
    gram_b = (bt @ bt.mT) * (lengths[:, :, None] * lengths[:, None, :])
    root, inverse = _square_root(gram_a)
    squares, vectors = torch.linalg.eigh(root.mT @ gram_b @ root)
    values = squares[:, -rank:].clamp_min(0).sqrt()
    vectors = vectors[:, :, -rank:]
    halves = values.sqrt()
    lowest = halves.amax(dim=1, keepdim=True) * _NULL_SHARE**0.5
    undo = torch.where(halves > lowest, 1 / halves, torch.zeros_like(halves))
    left = undo[:, :, None] * (root @ vectors).mT * lengths[:, None, :]
    right = halves[:, :, None] * (vectors.mT @ inverse) / lengths[:, None, :]
    return left, right


def _square_root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """L and its inverse with gram = L L^T, `[modules, R, R]`.

    Cholesky where the rows are clearly independent; else eigenvectors, with the null space left out.
    """
    lower, failed = torch.linalg.cholesky_ex(gram)
    pivots = torch.diagonal(lower, dim1=1, dim2=2).amin(dim=1)
    weak = (failed > 0) | ~(pivots > _PIVOT_FLOOR)
    if weak.any():
        lower[weak] = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device).expand_as(lower)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    if weak.any():
        squares, vectors = torch.linalg.eigh(gram[weak])
        kept = squares > squares[:, -1:] * _NULL_SHARE
        roots = torch.where(kept, squares, torch.ones_like(squares)).sqrt()[:, None, :]
        lower[weak] = vectors * roots * kept[:, None, :]
        inverse[weak] = (vectors / roots * kept[:, None, :]).mT
    return lower, inverse
