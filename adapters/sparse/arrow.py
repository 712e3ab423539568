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
        self._seed = seed
        super().__init__(experts, device=device, dtype=dtype)

    def _read(self, expert: LoraAdapter) -> dict[str, Tensor]:
        """Prototypes, `[in]` float32; the modules of one shape are iterated together."""
        found: dict[str, Tensor] = {}
        for stack in expert.stacks:
            found.update(zip(stack.modules, prototypes(stack.a, stack.bt.mT, self._seed), strict=True))
        return found

    def _place(self, pairs: Sequence[LoraPair], found: Sequence[Tensor]) -> ExpertGated:
        return ExpertGated(
            [pair.a.to(self._device, self._dtype) for pair in pairs],
            [pair.b.to(self._device) for pair in pairs],
            [pair.scale for pair in pairs],
            torch.stack(list(found)).to(self._device),
            self._gate(1, 1.0),
        )

    def _gate(self, top_k: int, temperature: float) -> ExpertGate:
        return ExpertGate(top_k, temperature, magnitude=True)
