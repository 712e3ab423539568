"""The activations that the compiled forms know, by number."""

from typing import Any

from torch import nn

SILU, GELU, GELU_TANH, RELU = range(4)

#: By the names of their classes in torch and transformers.
_CODES = {
    "SiLU": SILU,
    "SiLUActivation": SILU,
    "GELU": GELU,
    "GELUActivation": GELU,
    "GELUTanh": GELU_TANH,
    "NewGELUActivation": GELU_TANH,
    "ReLU": RELU,
}


def activation_code(activation: Any) -> int | None:
    """The number of an activation; `None` where only its own code knows it."""
    if isinstance(activation, nn.GELU) and activation.approximate == "tanh":
        return GELU_TANH
    return _CODES.get(type(activation).__name__)
