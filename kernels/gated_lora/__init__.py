"""`y += (x Aᵀ ⊙ g) B`: every LoRA mixture that adds its deltas linearly at one layer, for a whole batch.

A and B hold the rows of many adapters, stacked along the rank; only the gate `g` says which token uses which
row, and how much of it. One batch may therefore mix requests with different blends.
"""

import torch

from loramux.kernels.gated_lora.dense import DenseForm
from loramux.kernels.gated_lora.form import Bound, Form
from loramux.kernels.gated_lora.native import FUNCTIONS, NativeForm, library
from loramux.kernels.gated_lora.plan import GateSlot, Plan, plan_step
from loramux.kernels.gated_lora.reference import dense_gate, gated_lora_reference

__all__ = [
    "Bound",
    "DenseForm",
    "Form",
    "GateSlot",
    "NativeForm",
    "Plan",
    "choose_form",
    "dense_gate",
    "gated_lora_reference",
    "plan_step",
]


def choose_form(device: torch.device, activations: torch.dtype, factors: torch.dtype) -> Form:
    """The fastest form that this machine has for inputs and factors of these kinds."""
    if device.type == "cpu" and (activations, factors) in FUNCTIONS and library() is not None:
        return NativeForm(activations, factors)
    return DenseForm()
