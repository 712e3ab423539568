"""Arrow: every token chooses among experts of a pool by the directions they amplify.

Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs" (2024), with the choices
of PEFT's `create_arrow_model`: prototypes by power iteration, |x · v_e|, top-k, softmax.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from loramux.adapters.lora import LoraAdapter, LoraPair
from loramux.adapters.sparse.token_experts import TokenExperts
from loramux.kernels.gated_lora.gates import ExpertGate, ExpertGated
from loramux.kernels.gated_lora.prototypes import prototypes


class ArrowExperts(TokenExperts):
    """The experts of a set with a prototype for each module, float32 whatever the factors are.

    Args:
        seed: of the power iterations; the same experts and seed give the same prototypes.

    Raises:
        BlendError: there are no experts.
        BaseMismatchError: two experts have other shapes at one module.
    """

    def __init__(
        self,
        experts: Sequence[LoraAdapter],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self._found = [_prototypes(expert, seed) for expert in experts]
        super().__init__(experts, device=device, dtype=dtype)
        del self._found

    def _place(self, path: str, members: Sequence[int], pairs: Sequence[LoraPair]) -> ExpertGated:
        return ExpertGated(
            [pair.a.to(self._device, self._dtype) for pair in pairs],
            [pair.b.to(self._device) for pair in pairs],
            [pair.scale for pair in pairs],
            torch.stack([self._found[i][path] for i in members]).to(self._device),
            self._gate(1, 1.0),
        )

    def _gate(self, top_k: int, temperature: float) -> ExpertGate:
        return ExpertGate(top_k, temperature, magnitude=True)


def _prototypes(expert: LoraAdapter, seed: int) -> dict[str, Tensor]:
    """Of every module, `[in]` float32; the modules of one shape are iterated together."""
    found: dict[str, Tensor] = {}
    for stack in expert.stacks:
        found.update(zip(stack.modules, prototypes(stack.a, stack.bt.mT, seed), strict=True))
    return found
