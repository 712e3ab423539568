"""What a form of a layer gains on this machine, measured on a matrix that no cache holds."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loramux.kernels.packed_linear.kinds import BLOCK, Kind, Packed
from loramux.kernels.packed_linear.native import NativeMatrix
from loramux.kernels.packed_linear.onednn import PackedLinear, can_pack

#: Copies of the matrix take so many bytes in float32: more than caches have.
_BYTES = 96 * 2**20
#: A larger matrix is measured by some of its rows.
_VALUES = 2**21


class Timing(NamedTuple):
    """Seconds that some tokens take at a matrix of this shape, in float32 and as it is stored."""

    rows: int
    columns: int
    plain: float
    stored: float


@torch.inference_mode()
def time_product(rows: int, columns: int, kind: Kind, tokens: int = 1) -> Timing:
    """Measure both forms in turns, in some tenths of a second and 200 MB. The library must be there."""
    rows = max(1, min(rows, _VALUES // columns))
    copies = max(2, _BYTES // (4 * rows * columns))
    x = torch.ones(tokens, columns)
    stride = -(-columns // BLOCK) * kind.block_bytes
    scales = torch.ones(rows) if kind is Kind.INT8 else None
    data = [torch.zeros(rows, stride, dtype=torch.uint8).fill_(1) for _ in range(copies)]
    stored = [NativeMatrix(Packed(kind, columns, one, scales)).multiply for one in data]
    plain = [_plain(torch.full((rows, columns), 0.01)) for _ in range(copies)]
    best = [float("inf"), float("inf")]
    forms: tuple[Sequence[Callable[[Tensor], Tensor]], ...] = (plain, stored)
    for _ in range(4):
        for place, layers in enumerate(forms):
            started = time.perf_counter()
            for layer in layers:
                layer(x)
            best[place] = min(best[place], (time.perf_counter() - started) / copies)
    return Timing(rows, columns, *best)


def _plain(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """As `pack_linears` has it."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return PackedLinear(linear).forward if can_pack(weight) else linear.forward
