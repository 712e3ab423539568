"""SpectR: every token chooses among experts of a pool by how much of it lies in what each of them reads.

Fleshman and Van Durme, "SpectR: Dynamically Composing LM Experts with Spectral Routing" (2025, arXiv
2504.03454). An expert is stored as A* = Vᵀ and B* = U S of its B A = U S Vᵀ, and its score is ‖A* x‖₂: the
authors write it so in equations 1 to 4 and 7 of "LoRA-Augmented Generation" (2025, arXiv 2507.05346), and
their code computes it so. Unlike Arrow's it counts every direction of an expert, and needs no prototypes: the
products are those that the expert's own output is made of.

The chosen experts are weighted by a softmax of their scores and their outputs summed, as Arrow's are; the
authors' code gives each 1/k, which a high temperature comes to.
"""

from collections.abc import Sequence

from torch import Tensor

from loramux.adapters.lora import LoraAdapter, LoraPair
from loramux.adapters.sparse.spectral import spectral
from loramux.adapters.sparse.token_experts import TokenExperts
from loramux.kernels.gated_lora.gates import ExpertGate, ExpertGated

Factors = tuple[Tensor, Tensor]


class SpectrExperts(TokenExperts):
    """The experts of a set in their spectral form, which takes the room that their factors do.

    An expert of a larger rank reads more directions, and its score is never smaller for them.

    Raises:
        BlendError: there are no experts.
        BaseMismatchError: two experts have other shapes at one module.
    """

    def _read(self, expert: LoraAdapter) -> dict[str, Factors]:
        """A* and B*ᵀ of every module, float32; the modules of one shape are decomposed together."""
        found: dict[str, Factors] = {}
        for stack in expert.stacks:
            a, bt = spectral(stack.a, stack.bt)
            found.update(zip(stack.modules, zip(a.float(), bt.float(), strict=True), strict=True))
        return found

    def _place(self, pairs: Sequence[LoraPair], found: Sequence[Factors]) -> ExpertGated:
        return ExpertGated(
            [a.to(self._device, self._dtype) for a, _ in found],
            [bt.T.to(self._device) for _, bt in found],
            [pair.scale for pair in pairs],
            None,
            self._gate(1, 1.0),
        )

    def _gate(self, top_k: int, temperature: float) -> ExpertGate:
        return ExpertGate(top_k, temperature)
