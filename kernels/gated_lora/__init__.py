"""`y += (x Aᵀ ⊙ g) B`: every LoRA mixture that adds its deltas linearly at one layer, for a whole batch.

A and B hold the rows of many adapters, stacked along the rank; only the gate `g` says which token uses which
row, and how much of it. One batch may therefore mix requests with different blends.
"""

from loramux.kernels.gated_lora.cpu import BoundRun, bind, gated_lora_
from loramux.kernels.gated_lora.plan import GateSlot, Plan, Run, plan_runs
from loramux.kernels.gated_lora.reference import dense_gate, gated_lora_reference

__all__ = [
    "BoundRun",
    "GateSlot",
    "Plan",
    "Run",
    "bind",
    "dense_gate",
    "gated_lora_",
    "gated_lora_reference",
    "plan_runs",
]
