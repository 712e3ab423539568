"""Tokens that gate themselves, in C++ for a CPU (`native.cpp`): one call a module instead of ten."""

import ctypes

import torch
from torch import Tensor

from loramux.kernels.gated_lora.native import SERIAL, library

#: Tokens of a call; more come in pieces. And experts, or ranks of a gate over the rank, at most.
MAX_TOKENS, MAX_PARTS = 256, 2048
_ORDER = torch.arange(MAX_TOKENS, dtype=torch.int32)


class TokenGate(ctypes.Structure):
    """`TokenGate` of native.cpp."""

    _fields_ = [
        ("stacked", ctypes.c_void_p),
        ("bt", ctypes.c_void_p),
        ("owner", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("n_in", ctypes.c_int64),
        ("n_out", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("logits", ctypes.c_int64),
        ("experts", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("magnitude", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("serial", ctypes.c_int64),
        ("scale", ctypes.c_float),
    ]


class NativeTokens:
    """One module: A and the router stacked, B transposed, and what the gate is made of.

    What a token gets does not depend on the others, to the last bit.

    Args:
        stacked: `[rank + logits, in]`, contiguous float32 on the CPU, as `bt` `[rank, out]`.
        owner: `[rank]` int32, the expert of every row: the gate is the softmax over the `k` best of
            `experts` logits, or without logits of the norms of each expert's hidden values. `None`: the mean
            of `experts` softmaxes over the rank; no gate where `experts` is 0.
        scale: what logits are multiplied by in the softmax.
        magnitude: logits count by their absolute value.

    Raises:
        RuntimeError: there is no library here, or it has no kernel for these tensors; `can_serve` tells.
    """

    def __init__(
        self,
        stacked: Tensor,
        bt: Tensor,
        owner: Tensor | None,
        experts: int,
        *,
        k: int = 0,
        scale: float = 1.0,
        magnitude: bool = False,
    ) -> None:
        found = library()
        if found is None or not can_serve(stacked, bt, owner, experts):
            raise RuntimeError("there is no native kernel for these factors here")
        self._function = found.gated_lora_tokens_f32
        rank, n_out = bt.shape
        self._parts = rank if owner is None and experts else experts
        self._rows, self._width = stacked.shape[0], stacked.shape[0] + self._parts + rank
        self._call = TokenGate(
            stacked.data_ptr(), bt.data_ptr(), None if owner is None else owner.data_ptr(), _ORDER.data_ptr(),
            stacked.shape[1], n_out, rank, self._rows - rank, experts, min(k or experts, experts), magnitude,
            torch.get_num_threads(), SERIAL, scale,
        )  # fmt: skip
        self._address = ctypes.addressof(self._call)
        self._owners = (stacked, bt, owner)  # the addresses are good for as long as these live

    def takes(self, y: Tensor, x: Tensor) -> bool:
        """Whether `add_` may be called."""
        return y.dtype == x.dtype == torch.float32

    def add_(self, y: Tensor, x: Tensor) -> Tensor:
        """Add to y `[T, out]` in place, given x `[T, in]`, both float32 and y contiguous; returns the gate,
        `[T, experts or rank]`."""
        x = x.contiguous()
        if len(x) <= MAX_TOKENS:
            return self._add(y, x)
        pieces = [slice(start, start + MAX_TOKENS) for start in range(0, len(x), MAX_TOKENS)]
        return torch.cat([self._add(y[at], x[at]) for at in pieces])

    def _add(self, y: Tensor, x: Tensor) -> Tensor:
        tokens = x.shape[0]
        scratch = torch.empty(tokens * self._width)
        self._function(self._address, y.data_ptr(), x.data_ptr(), scratch.data_ptr(), tokens)
        first = tokens * self._rows
        return scratch[first : first + tokens * self._parts].view(tokens, self._parts)


def can_serve(stacked: Tensor, bt: Tensor, owner: Tensor | None, experts: int) -> bool:
    """Whether there is a kernel for factors and a gate like these."""
    parts = bt.shape[0] if owner is None and experts else experts
    return (
        library() is not None
        and max(experts, parts) <= MAX_PARTS
        and all(
            tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()
            for tensor in (stacked, bt)
        )
    )
