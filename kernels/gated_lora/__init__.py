"""`y += (x Aᵀ ⊙ g) B`: every LoRA mixture that adds its deltas linearly at one layer, for a whole batch.

A and B hold the rows of many adapters, stacked along the rank; only the gate `g` says which token uses which
row, and how much of it. One batch may therefore mix requests with different blends.
"""

from importlib.util import find_spec

import torch

from loramux.kernels.gated_lora.dense import DenseForm
from loramux.kernels.gated_lora.form import Bound, BoundAll, Form
from loramux.kernels.gated_lora.gate_slot import GateSlot
from loramux.kernels.gated_lora.native import FUNCTIONS, NativeBound, NativeForm, library
from loramux.kernels.gated_lora.plan import BARE, Plan, Slot, plan_step
from loramux.kernels.gated_lora.reference import dense_gate, gated_lora_reference
from loramux.kernels.gated_lora.shares import Adding, Share, TokenSlot

__all__ = [
    "BARE",
    "Adding",
    "Bound",
    "BoundAll",
    "DenseForm",
    "Form",
    "GateSlot",
    "NativeBound",
    "NativeForm",
    "Plan",
    "Share",
    "Slot",
    "TokenSlot",
    "choose_form",
    "dense_gate",
    "gated_lora_reference",
    "plan_step",
]


def choose_form(device: torch.device, activations: torch.dtype, factors: torch.dtype) -> Form:
    """The fastest form that this machine has for inputs and factors of these kinds."""
    if device.type == "cpu" and (activations, factors) in FUNCTIONS and library() is not None:
        return NativeForm(activations, factors)
    if device.type == "cuda" and activations == factors and find_spec("triton") is not None:
        from loramux.kernels.gated_lora.cuda import TritonForm  # compiles, and needs triton

        return TritonForm()
    return DenseForm()
