"""The spectral form of an expert: the same update, with the directions that it reads as the rows of A."""

import torch
from torch import Tensor

#: Singular values below this share of the largest are noise of the precision that experts are trained in.
NULL_SHARE = 1e-6


def spectral(a: Tensor, bt: Tensor) -> tuple[Tensor, Tensor]:
    """A* = Vᵀ and B*ᵀ = (U S)ᵀ with B A = U S Vᵀ, from matrices of rank size only.

    With A = Lᵀ Qᵀ and B = P R the product is P (R Lᵀ) Qᵀ, and the small matrix in the middle has the singular
    values. Directions that the update does not read have rows of zeros: they could be any.

    Args:
        a: `[modules, r, in]`; bt: `[modules, r, out]`, B transposed.

    Returns:
        the same shapes in float64, the rows by falling singular value.
    """
    q, left = torch.linalg.qr(a.double().mT)  # [in, r'], [r', r]
    p, right = torch.linalg.qr(bt.double().mT)
    u, values, vt = torch.linalg.svd(right @ left.mT, full_matrices=False)
    read = values > NULL_SHARE * values[:, :1]
    rows = torch.where(read[:, :, None], vt @ q.mT, 0.0)
    columns = torch.where(read[:, :, None], (p @ (u * values[:, None, :])).mT, 0.0)
    short = a.shape[1] - rows.shape[1]  # of a rank above a side of the module
    return _filled(rows, short), _filled(columns, short)


def _filled(rows: Tensor, more: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, more)) if more else rows
