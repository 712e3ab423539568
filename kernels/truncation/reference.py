"""The operator by sorting, as its definition reads."""

import torch
from torch import Tensor


def truncation_bound_reference(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The least weight that top-k and then top-p keep, in each row.

    Top-k keeps the k largest and all that are as large as the last of them. Top-p keeps, of these, the
    largest ones until their sum reaches that share of the whole, at least one, and all that are as large as
    the last.

    Args:
        weights: [R, n], not negative, not normalised.
        top_k: int64 [R, 1], from 1; n and more keep all.
        top_p: [R, 1]; 1 and more keep all.

    Returns:
        [R, 1], of the weights' dtype.
    """
    ordered = weights.sort(dim=-1, descending=True).values
    last = ordered.gather(-1, top_k.clamp(max=weights.shape[-1]) - 1)
    sums = ordered.double() * (ordered >= last)
    above = sums.cumsum(dim=-1)
    kept = (above - sums < top_p.double() * above[:, -1:]) & (ordered >= last)
    kept[:, 0] = True
    nucleus = torch.where(kept, ordered, torch.inf).amin(dim=-1, keepdim=True)
    return torch.where(top_p < 1, nucleus, last)
