"""A blend as one plain LoRA of an allowed rank: what any engine that serves LoRA can load."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch

from loramux.adapters.blend import Blend
from loramux.adapters.errors import BlendError
from loramux.adapters.lora import FactorStack, LoraAdapter
from loramux.adapters.merge import Parts, merge
from loramux.adapters.merge.joint import column


class TooWide(BlendError):
    """The exact sum has a larger rank than the engine takes."""


class Materialised(NamedTuple):
    """A blend ready to be written.

    Attributes:
        adapter: every module has one rank and scale 1; weights and scales are in B.
        method: what was done; `svd` where the exact sum was too wide.
        rank: of the blend, before padding.
        relative_error: Frobenius norm of its distance from the exact weighted sum, over the norm of the sum.
    """

    adapter: LoraAdapter
    method: str
    rank: int
    relative_error: float


def materialise(blend: Blend, parts: Parts, ranks: Sequence[int], *, truncate: bool) -> Materialised:
    """Merge a blend, fold weights and scales into B, and pad every module to one of `ranks`.

    Padding adds rows of zeros, so it changes nothing but the size. Everything is computed in float32; an
    engine rounds once, to its own type.

    Args:
        blend: not bare.
        parts: its experts and their weights.
        ranks: what the engine takes, ascending.
        truncate: an exact blend that is too wide becomes its best approximation of the largest rank.

    Raises:
        TooWide: the result has a larger rank than any of `ranks`, and is not to be truncated.
        BlendError: it cannot be merged, or a folded scale leaves the range of its type.
    """
    limit = ranks[-1]
    stored = reduce(torch.promote_types, (adapter.dtype for adapter, _ in parts))
    parts = [(adapter.to(torch.float32), weight) for adapter, weight in parts]
    merged = merge(parts, blend.method, rank=blend.rank, density=blend.density, seed=blend.seed or 0)
    method = blend.method
    if merged.rank > limit:
        if method not in ("exact", "svd") or not truncate:
            raise TooWide(
                f"the {method} blend has rank {merged.rank} and the backend takes {limit}; ask for fewer or "
                f"smaller experts, for svd, or raise its largest rank"
            )
        merged = merge(parts, "svd", rank=limit)
        method = "svd"
    rank = next(one for one in ranks if one >= merged.rank)
    kept = stored if method == "exact" else torch.float32
    stacks = [_padded(stack, rank, kept) for stack in merged.adapter.stacks]
    adapter = LoraAdapter.from_stacks(merged.adapter.id, merged.adapter.content_hash, stacks)
    return Materialised(adapter, method, merged.rank, merged.relative_error)


def _padded(stack: FactorStack, rank: int, dtype: torch.dtype) -> FactorStack:
    """A, which an exact merge leaves as it is, in `dtype`; B, which has the weights in it, in float32."""
    count, (out_features, in_features) = len(stack.modules), stack.shape
    a = torch.zeros(count, rank, in_features, dtype=dtype)
    bt = torch.zeros(count, rank, out_features)
    a[:, : stack.rank] = stack.a
    torch.mul(stack.bt, column(stack.scales, stack.bt), out=bt[:, : stack.rank])
    if not torch.isfinite(bt).all():
        raise BlendError(f"{stack.modules[0]}: weight times scale times B leaves the range of float32")
    return FactorStack(stack.modules, a, bt, (1.0,) * count)
