"""Products with stored matrices in C++ for a CPU (`native.cpp`)."""

import ctypes
from enum import IntEnum
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from loramux.kernels.compiled import compiled
from loramux.kernels.packed_linear.kinds import BLOCK, Kind, Packed

#: Below this many products a second thread is not worth waking.
_SERIAL = 32768
#: Kinds as native.cpp numbers them.
_NUMBERS = {kind: number for number, kind in enumerate(Kind)}


class Instructions(IntEnum):
    """Instruction sets, as native.cpp numbers them."""

    BEST = 0
    BASELINE = 1
    AVX2 = 2
    AVX512 = 3
    AMX = 4


class _Matrix(ctypes.Structure):
    """`Matrix` of native.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("data", "scales", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "blocks", "stride", "kind", "set")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or `None` where the package was installed without a C++ compiler."""
    found = compiled(__file__)
    if found is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        found.packed_linear.argtypes = [pointer, pointer, pointer, number, number]
        found.packed_linear.restype = None
        found.packed_linear_widen.argtypes = [pointer, pointer, pointer, number, number, number]
        found.packed_linear_widen.restype = None
        found.packed_linear_best.restype = number
    return found


def instruction_sets() -> list[Instructions]:
    """Those that this processor has and the library was built for."""
    found = library()
    best = 0 if found is None else found.packed_linear_best()
    return [one for one in Instructions if Instructions.BASELINE <= one <= best]


class NativeMatrix:
    """A stored matrix with a bias, for the library, which knows it by its `address`. For fewer tokens than
    `serial` one thread is enough.

    Raises:
        RuntimeError: when made without a library.
        ValueError: a tensor is not on the CPU.
    """

    def __init__(
        self, packed: Packed, bias: Tensor | None = None, instructions: Instructions = Instructions.BEST
    ) -> None:
        found = library()
        if found is None:
            raise RuntimeError("there is no native packed_linear here")
        owners = (packed.data, packed.scales, None if bias is None else bias.detach().float().contiguous())
        if any(tensor is not None and tensor.device.type != "cpu" for tensor in owners):
            raise ValueError("native packed_linear is for tensors on the CPU")
        best = found.packed_linear_best()
        chosen = best if instructions is Instructions.BEST else min(instructions, best)
        #: Whether it multiplies any number of tokens faster than torch does widened rows.
        self.takes_many = chosen == Instructions.AMX and packed.kind is not Kind.F32
        self._multiply, self._widen = found.packed_linear, found.packed_linear_widen
        self._owners = owners  # the addresses are good for as long as these live
        data, scales, added = (None if tensor is None else tensor.data_ptr() for tensor in owners)
        self.rows, self._columns, self._filled = packed.rows, packed.columns, packed.blocks * BLOCK
        stride = packed.data.shape[1]
        self._matrix = _Matrix(
            data, scales, added, self.rows, packed.blocks, stride, _NUMBERS[packed.kind], instructions
        )
        self.address = ctypes.addressof(self._matrix)
        self.serial = -(-_SERIAL // max(1, self.rows * self._filled))

    def multiply(self, x: Tensor) -> Tensor:
        """x Wᵀ + b, float32 [..., rows], of x [..., columns]."""
        if x.dtype != torch.float32:
            x = x.float()
        if self._filled != self._columns:
            x = F.pad(x, (0, self._filled - self._columns))
        elif not x.is_contiguous():
            x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self.rows))
        tokens = x.numel() // self._filled
        if tokens:
            threads = torch.get_num_threads() if tokens >= self.serial else 1
            self._multiply(self.address, y.data_ptr(), x.data_ptr(), tokens, threads)
        return y

    def widen(self, first: int, count: int) -> Tensor:
        """`count` rows from `first` on, float32 [count, columns]."""
        out = torch.empty(count, self._filled)
        self._widen(self.address, out.data_ptr(), None, first, count, self._threads(count))
        return out[:, : self._columns]

    def take(self, which: Tensor) -> Tensor:
        """The rows `which`, float32 [..., columns]; they are not checked."""
        which = which.long().contiguous()
        out = torch.empty(*which.shape, self._filled)
        count = which.numel()
        self._widen(self.address, out.data_ptr(), which.data_ptr(), 0, count, self._threads(count))
        return out[..., : self._columns]

    def _threads(self, rows: int) -> int:
        return torch.get_num_threads() if rows * self._filled >= _SERIAL else 1
