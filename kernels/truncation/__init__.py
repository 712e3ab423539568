"""Where top-k and top-p end: the least weight that is kept in each row of a batch."""

from torch import Tensor

from loramux.kernels.truncation.reference import truncation_bound_reference

__all__ = ["truncation_bound", "truncation_bound_reference"]


def truncation_bound(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """As `truncation_bound_reference`, by the fastest way that this machine has."""
    return truncation_bound_reference(weights, top_k, top_p)
