"""What lies between a block's projections, in C++ for a CPU (`native.cpp`): one call, not ten an expert."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from loramux.kernels.compiled import compiled
from loramux.kernels.gated_lora.plain import shrink
from loramux.kernels.mixlora_ffn.activations import activation_code
from loramux.kernels.mixlora_ffn.ffn import Experts, Ffn, Gated, Halves, Spread
from loramux.kernels.mixlora_ffn.mixed import Mixed
from loramux.kernels.mixlora_ffn.routing import Routes

#: Of a call.
MAX_TOKENS = 128
#: Columns are worked on eight at a time, and summed over in blocks.
_LANES, _BLOCK = 8, 256
#: Below this many products a block is not worth waking a second thread for.
_SERIAL = 32768


class _Mix(ctypes.Structure):
    """`Mix` of native.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gate", "up", "low", "gate_b", "up_b", "last_a", "weights")),
        *((name, ctypes.c_void_p) for name in ("hidden", "last")),
        *((name, ctypes.c_int64) for name in ("tokens", "width", "experts", "stride_gate", "stride_up")),
        *((name, ctypes.c_int64) for name in ("stride_low", "stride_gate_b", "stride_up_b", "gate_column")),
        *((name, ctypes.c_int64) for name in ("up_column", "gate_rank", "up_rank", "last_rank")),
        *((name, ctypes.c_int64) for name in ("activation", "gated", "threads")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or `None` where the package was installed without a C++ compiler."""
    found = compiled(__file__)
    if found is not None:
        found.mixlora_mix_f32.argtypes = [ctypes.c_void_p]
        found.mixlora_mix_f32.restype = None
    return found


def takes(x: Tensor, first: dict[str, Tensor], ffn: Ffn, experts: Experts) -> bool:
    """Whether `mix` may be called with these."""
    return (
        x.device.type == "cpu"
        and x.dtype == experts.dtype == torch.float32
        and library() is not None
        and activation_code(ffn.activate.activation) is not None
        and _width(first, ffn) % _LANES == 0
    )


def mix(x: Tensor, first: dict[str, Tensor], ffn: Ffn, experts: Experts, routes: Routes) -> Mixed:
    """As `fused.mix`, for what `takes` says yes to. What a token gets does not depend on the others, to the
    last bit."""
    if x.shape[0] <= MAX_TOKENS:
        return _mix(x, first, ffn, experts, routes)
    pieces = []
    for start in range(0, x.shape[0], MAX_TOKENS):
        at = slice(start, start + MAX_TOKENS)
        parts = {name: part[at] for name, part in first.items()}
        pieces.append(_mix(x[at], parts, ffn, experts, routes[at]))
    lows = [piece.low for piece in pieces if piece.low is not None]
    return Mixed(torch.cat([piece.hidden for piece in pieces]), torch.cat(lows) if lows else None)


def _mix(x: Tensor, first: dict[str, Tensor], ffn: Ffn, experts: Experts, routes: Routes) -> Mixed:
    found = library()
    if found is None:
        raise RuntimeError("there is no native mixlora_ffn here; `takes` tells")
    tokens, width, count = x.shape[0], _width(first, ffn), experts.count
    parts = [part.contiguous() for part in first.values()]
    gate, up = parts[0], parts[-1]
    spread = [experts.first.get(name) for name in first]
    gate_spread, up_spread = spread[0], spread[-1]
    # With both in one projection, the factor is its second half.
    half = width * x.itemsize if isinstance(ffn.activate, Halves) else 0
    low = x.new_empty(0) if experts.shrink is None else shrink(x, experts.shrink)
    weights = routes.weights.float().contiguous()
    last_a = experts.last_a
    last_rank = 0 if last_a is None else last_a.shape[1]
    products = tokens * width * (_rank(gate_spread) + _rank(up_spread) + last_rank + 16)
    threads = torch.get_num_threads() if products >= _SERIAL else 1
    hidden, last = x.new_empty(tokens, width), torch.zeros(-(-width // _BLOCK), tokens, count * last_rank)
    call = _Mix(
        gate=gate.data_ptr(),
        up=up.data_ptr() + half,
        low=low.data_ptr(),
        gate_b=_address(gate_spread),
        up_b=_address(up_spread) + half,
        last_a=0 if last_a is None else last_a.data_ptr(),
        weights=weights.data_ptr(),
        hidden=hidden.data_ptr(),
        last=last.data_ptr(),
        tokens=tokens,
        width=width,
        experts=count,
        stride_gate=gate.shape[1],
        stride_up=up.shape[1],
        stride_low=low.shape[-1],
        stride_gate_b=_stride(gate_spread),
        stride_up_b=_stride(up_spread),
        gate_column=0 if gate_spread is None else gate_spread.columns.start,
        up_column=0 if up_spread is None else up_spread.columns.start,
        gate_rank=_rank(gate_spread),
        up_rank=_rank(up_spread),
        last_rank=last_rank,
        activation=activation_code(ffn.activate.activation),
        gated=isinstance(ffn.activate, Gated | Halves),
        threads=threads,
    )
    found.mixlora_mix_f32(ctypes.addressof(call))
    return Mixed(hidden, None if last_a is None else last[0])


def _width(first: dict[str, Tensor], ffn: Ffn) -> int:
    return next(iter(first.values())).shape[1] // (2 if isinstance(ffn.activate, Halves) else 1)


def _address(spread: Spread | None) -> int:
    return 0 if spread is None else spread.bt.data_ptr()


def _rank(spread: Spread | None) -> int:
    return 0 if spread is None else spread.bt.shape[1]


def _stride(spread: Spread | None) -> int:
    return 0 if spread is None else spread.bt.shape[2]
