"""Products with a factor that all tokens use. On a CPU in float32 a row of the result depends on its row of
the input alone, to the last bit, which those of torch do not promise."""

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import linear

from loramux.kernels.compiled import readable
from loramux.kernels.gated_lora.native import SERIAL, library


class _Plain(ctypes.Structure):
    """`Plain` of native.cpp."""

    _fields_ = [
        ("factor", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    ]


def shrink(x: Tensor, a: Tensor) -> Tensor:
    """`x Aᵀ`, [T, rows], of x [T, width] and A [rows, width]."""
    found = library()
    if found is None or not _takes(x, a):
        return linear(x, a)
    x = x.contiguous()
    hidden = x.new_empty(x.shape[0], a.shape[0])
    call, order = _call(a, x.shape[0])
    found.gated_lora_shrink_f32(ctypes.addressof(call), x.data_ptr(), hidden.data_ptr(), len(order))
    return hidden


def expand(y: Tensor, hidden: Tensor, b: Tensor) -> Tensor:
    """`y + h B`, [T, width], of h [T, rows] and B [rows, width]; y may be changed."""
    found = library()
    if found is None or not _takes(y, hidden, b):
        return torch.addmm(y, hidden, b)
    y, hidden = y.contiguous(), hidden.contiguous()
    call, order = _call(b, y.shape[0])
    found.gated_lora_expand_f32(ctypes.addressof(call), y.data_ptr(), hidden.data_ptr(), len(order))
    return y


def _call(factor: Tensor, tokens: int) -> tuple[_Plain, Tensor]:
    order = torch.arange(tokens, dtype=torch.int32)
    rows, width = factor.shape
    threads = torch.get_num_threads() if tokens * rows * width >= SERIAL else 1
    return _Plain(factor.data_ptr(), order.data_ptr(), rows, width, threads), order


def _takes(*tensors: Tensor) -> bool:
    return tensors[-1].is_contiguous() and readable(*tensors)
