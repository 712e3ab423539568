"""Arrow: every token chooses among experts of a pool by the directions they amplify; nothing is trained.

Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs" (2024), with the choices
of PEFT's `create_arrow_model`: prototypes by power iteration, |x · v_e|, top-k, softmax.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from loramux.adapters.errors import BaseMismatchError, BlendError
from loramux.adapters.lora import LoraAdapter, LoraPair
from loramux.adapters.sparse.slot import SparseSlot
from loramux.adapters.sparse.tally import Tally
from loramux.kernels.gated_lora.gates import ExpertGate, ExpertGated
from loramux.kernels.gated_lora.prototypes import prototypes


class ArrowExperts:
    """The experts of a set with their prototypes, on the device; slots over them share the tensors.

    Experts may differ in rank and in the modules they target: one without a module takes no part there.

    Args:
        dtype: of the factors. Prototypes are float32.
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
        if not experts:
            raise BlendError("arrow needs at least one expert")
        found = [_prototypes(expert, seed) for expert in experts]
        self._placed: dict[str, ExpertGated] = {}
        for path in sorted({path for expert in experts for path in expert.pairs}):
            members = [i for i, expert in enumerate(experts) if path in expert.pairs]
            pairs = [experts[i].pairs[path] for i in members]
            _check(path, [experts[i].id for i in members], pairs)
            self._placed[path] = ExpertGated(
                [pair.a.to(device, dtype) for pair in pairs],
                [pair.b.to(device) for pair in pairs],
                [pair.scale for pair in pairs],
                torch.stack([found[i][path] for i in members]).to(device),
                ExpertGate(magnitude=True),  # replaced by `slot`
            )
        self._device = device

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(placed.nbytes for placed in self._placed.values())

    def slot(self, top_k: int, temperature: float = 1.0) -> SparseSlot:
        """What requests refer to that route over these experts; it holds no tensors of its own.

        Raises:
            BlendError: `top_k` or `temperature` is not positive.
        """
        if top_k < 1 or not temperature > 0:
            raise BlendError(f"arrow needs a positive top_k and temperature, got {top_k} and {temperature}")
        gate = ExpertGate(top_k, temperature, magnitude=True)
        linear = {path: placed.with_gate(gate) for path, placed in self._placed.items()}
        return SparseSlot(linear, {}, Tally(0, self._device))


def _prototypes(expert: LoraAdapter, seed: int) -> dict[str, Tensor]:
    """Of every module, `[in]` float32; the modules of one shape are iterated together."""
    found: dict[str, Tensor] = {}
    for stack in expert.stacks:
        found.update(zip(stack.modules, prototypes(stack.a, stack.bt.mT, seed), strict=True))
    return found


def _check(path: str, names: Sequence[str], pairs: Sequence[LoraPair]) -> None:
    shapes = {name: (pair.b.shape[0], pair.a.shape[1]) for name, pair in zip(names, pairs, strict=True)}
    if len(set(shapes.values())) > 1:
        raise BaseMismatchError(f"{path}: the experts were made for different bases: (out, in) is {shapes}")
