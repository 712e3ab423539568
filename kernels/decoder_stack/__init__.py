"""All layers of a decode step in one call, on a CPU in float32 (`native.cpp`).

With `n = norm(h)`, a layer is `h += o(attend(rotate(q(n)), rotate(k(n)), v(n)))` and then, with `n` anew,
`h += down(silu(gate(n)) * up(n))`. The operators are those of `packed_linear`, `pointwise`, `paged_attention`
and `gated_lora`, in the same order and with the same threads as when each is called from Python, so the sums
are the same to the last bit.
"""

import ctypes
from enum import IntEnum
from functools import cache

from loramux.kernels.compiled import compiled

__all__ = ["Layer", "Operators", "Place", "Projection", "Step", "library"]

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64


class Place(IntEnum):
    """Projections of a layer, as native.cpp numbers them."""

    Q = 0
    K = 1
    V = 2
    O = 3  # noqa: E741 - as the layers are called everywhere
    GATE = 4
    UP = 5
    DOWN = 6


class Operators(ctypes.Structure):
    """Addresses of the libraries' functions."""

    _fields_ = [(name, _POINTER) for name in ("linear", "norm", "rotate", "swiglu", "attend", "adapt")]


class Projection(ctypes.Structure):
    """A stored matrix, its rows, and the number of tokens from which on threads are woken."""

    _fields_ = [("matrix", _POINTER), ("rows", _NUMBER), ("serial", _NUMBER)]


class Layer(ctypes.Structure):
    """`Layer` of native.cpp."""

    _fields_ = [
        ("before_attention", _POINTER),
        ("before_feed_forward", _POINTER),
        ("projections", Projection * len(Place)),
        *((name, _POINTER) for name in ("attention", "keys", "values", "sinks")),
        *((name, _NUMBER) for name in ("heads", "kv_heads", "dim")),
        ("epsilon", ctypes.c_float),
        ("epsilon_feed_forward", ctypes.c_float),
    ]


class Step(ctypes.Structure):
    """`Step` of native.cpp."""

    _fields_ = [
        *(
            (name, _POINTER)
            for name in ("operators", "layers", "adapters", "rows", "cos", "sin", "hidden", "room")
        ),
        *((name, _NUMBER) for name in ("count", "tokens", "width", "widest", "threads", "serial")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or `None` where the package was installed without a C++ compiler."""
    found = compiled(__file__)
    if found is not None:
        found.decoder_stack.argtypes = [_POINTER]
        found.decoder_stack.restype = None
        found.decoder_stack_layer_bytes.restype = _NUMBER
        assert found.decoder_stack_layer_bytes() == ctypes.sizeof(Layer)
    return found
