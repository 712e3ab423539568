"""The experts of a set, on the device, among which every token of every layer chooses; nothing is trained."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loramux.adapters.errors import BaseMismatchError, BlendError
from loramux.adapters.lora import LoraAdapter, LoraPair
from loramux.adapters.sparse.slot import SparseSlot
from loramux.adapters.sparse.tally import Tally
from loramux.kernels.gated_lora.gates import ExpertGate, ExpertGated


class TokenExperts(ABC):
    """Slots over a set share its tensors; what a token chooses by is the subclass'.

    Experts may differ in rank and in the modules they target: one without a module takes no part there.

    Args:
        dtype: of the factors.

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
    ) -> None:
        if not experts:
            raise BlendError("a mixture that tokens choose from needs at least one expert")
        self._device = device
        self._dtype = dtype
        self._placed: dict[str, ExpertGated] = {}
        found = [self._read(expert) for expert in experts]
        for path in sorted({path for expert in experts for path in expert.pairs}):
            members = [i for i, expert in enumerate(experts) if path in expert.pairs]
            pairs = [experts[i].pairs[path] for i in members]
            _check(path, [experts[i].id for i in members], pairs)
            self._placed[path] = self._place(pairs, [found[i][path] for i in members])

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(placed.nbytes for placed in self._placed.values())

    def slot(self, top_k: int, temperature: float = 1.0) -> SparseSlot:
        """What requests refer to that route over these experts; it holds no tensors of its own.

        Raises:
            BlendError: `top_k` or `temperature` is not positive.
        """
        check_options(top_k, temperature)
        gate = self._gate(top_k, temperature)
        linear = {path: placed.with_gate(gate) for path, placed in self._placed.items()}
        return SparseSlot(linear, {}, Tally(0, self._device))

    @abstractmethod
    def _read(self, expert: LoraAdapter) -> Mapping[str, Any]:
        """What is computed of an expert once, by module."""

    @abstractmethod
    def _place(self, pairs: Sequence[LoraPair], found: Sequence[Any]) -> ExpertGated:
        """A module with the experts that target it, and what was read of them there; its gate is replaced by
        `slot`."""

    @abstractmethod
    def _gate(self, top_k: int, temperature: float) -> ExpertGate:
        """From what a token's products are to its gate."""


def check_options(top_k: int, temperature: float) -> None:
    """Raises `BlendError` where a token could not choose by them."""
    if top_k < 1 or not temperature > 0:
        raise BlendError(f"tokens choose by a positive top_k and temperature, not {top_k} and {temperature}")


def _check(path: str, names: Sequence[str], pairs: Sequence[LoraPair]) -> None:
    shapes = {name: (pair.b.shape[0], pair.a.shape[1]) for name, pair in zip(names, pairs, strict=True)}
    if len(set(shapes.values())) > 1:
        raise BaseMismatchError(f"{path}: the experts were made for different bases: (out, in) is {shapes}")
