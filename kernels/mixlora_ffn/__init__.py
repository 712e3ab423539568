"""MixLoRA's feed-forward block: `y = Σ_e w_e FFN_e(x)`, the experts being low-rank updates of one base block.

A nonlinearity sits between the experts' first and second projections, so this is not a case of `gated_lora`;
but all projections of the base are linear, and each of them runs once a token however many experts serve it.
"""

from loramux.kernels.mixlora_ffn.ffn import Combine, Experts, Factors, Ffn, Gated, Halves, Plain
from loramux.kernels.mixlora_ffn.fused import finish, mix, mixlora_ffn
from loramux.kernels.mixlora_ffn.reference import mixlora_ffn_reference
from loramux.kernels.mixlora_ffn.routing import Routes, probabilities, switch, top_k, top_p

__all__ = [
    "Combine",
    "Experts",
    "Factors",
    "Ffn",
    "Gated",
    "Halves",
    "Plain",
    "Routes",
    "finish",
    "mix",
    "mixlora_ffn",
    "mixlora_ffn_reference",
    "probabilities",
    "switch",
    "top_k",
    "top_p",
]
