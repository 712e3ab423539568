"""What lies between the products of a layer, on a CPU in float32: RMSNorm, rotary embedding, SwiGLU.

One call each in C++ (`native.cpp`). A decode step of a small model consists of thousands of torch calls of a
few microseconds; these take the place of about half of them. Callers check `library()`, types and layouts.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from loramux.kernels.compiled import compiled, readable

__all__ = ["SERIAL", "forbid_", "library", "rms_norm", "rotate_", "swiglu_", "takes"]

#: Below this many values a second thread is not worth waking.
SERIAL = 65536


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or `None` where the package was installed without a C++ compiler."""
    found = compiled(__file__)
    if found is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        found.pointwise_rms_norm.argtypes = [*[pointer] * 3, number, number, ctypes.c_float, number]
        found.pointwise_rotate.argtypes = [*[pointer] * 3, *[number] * 4]
        found.pointwise_swiglu.argtypes = [pointer, pointer, number, number]
        found.pointwise_forbid.argtypes = [pointer, number, pointer, number, pointer, number]
        for name in ("rms_norm", "rotate", "swiglu", "forbid"):
            getattr(found, f"pointwise_{name}").restype = None
    return found


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`x / sqrt(mean(x²) + epsilon) * weight` over the last dimension, float32."""
    x = x.contiguous()
    y = torch.empty_like(x)
    count, width = x.numel(), weight.shape[0]
    _there().pointwise_rms_norm(
        y.data_ptr(), x.data_ptr(), weight.data_ptr(), count // width, width, epsilon, _threads(count)
    )
    return y


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [tokens, heads, dim] in place: its halves (a, b) become (a cos - b sin, b cos + a
    sin). cos and sin are [tokens, dim]; all are contiguous float32."""
    tokens, heads, dim = x.shape
    _there().pointwise_rotate(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), tokens, heads, dim, _threads(x.numel())
    )
    return x


def forbid_(logits: Tensor, masks: Tensor, rows: Tensor) -> Tensor:
    """Minus infinity in some rows of logits [rows, vocabulary] where a row's mask has a 0, and beyond it.

    Args:
        logits: contiguous float32.
        masks: int32 [count, words], contiguous; token 32 w + i is bit i of word w.
        rows: int64 [count], the row of each mask; they are not checked.
    """
    count, words = masks.shape
    _there().pointwise_forbid(
        logits.data_ptr(), logits.shape[-1], masks.data_ptr(), words, rows.data_ptr(), count
    )
    return logits


def takes(*tensors: Tensor) -> bool:
    """Whether the operators may be called with these, once they are contiguous."""
    return library() is not None and readable(*tensors)


def swiglu_(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` in place of `gate`; both are contiguous float32 of one shape."""
    count = gate.numel()
    _there().pointwise_swiglu(gate.data_ptr(), up.data_ptr(), count, _threads(count))
    return gate


def _there() -> ctypes.CDLL:
    found = library()
    if found is None:
        raise RuntimeError("there is no native pointwise here")
    return found


def _threads(values: int) -> int:
    return torch.get_num_threads() if values >= SERIAL else 1
