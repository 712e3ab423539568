"""A sparse model on the device, ready to be applied to the tokens of the requests that use it."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from loramux.adapters.lora import LoraPair
from loramux.adapters.sparse.feed_forward import PlacedFfn
from loramux.adapters.sparse.model import ExpertMixture, RankMixture, SparseModel
from loramux.adapters.sparse.tally import ExpertLoad, Tally
from loramux.kernels.gated_lora import Adding
from loramux.kernels.gated_lora.gates import ExpertGate, ExpertGated, RankGated, Ungated

#: Linear modules whose routers are counted: enough to see a collapse, too few to cost anything.
WATCHED = 4


class PlacedLinear(Protocol):
    """What a slot adds at one linear module."""

    @property
    def nbytes(self) -> int: ...

    def add_(self, y: Tensor, x: Tensor) -> None:
        """Add to y [T, out] in place, given x [T, in]."""
        ...


class SparseSlot:
    """Where a sparse model lives on the device; what a request of a step refers to.

    Attributes:
        blocks: path of a feed-forward block -> what replaces it.
    """

    def __init__(
        self, linear: Mapping[str, PlacedLinear], blocks: Mapping[str, PlacedFfn], tally: Tally
    ) -> None:
        self._linear = dict(linear)
        self.blocks = dict(blocks)
        self._tally = tally

    @property
    def modules(self) -> Collection[str]:
        """The linear modules it adds to."""
        return self._linear.keys()

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors on the device."""
        linear = sum(placed.nbytes for placed in self._linear.values())
        return linear + sum(placed.nbytes for placed in self.blocks.values())

    def bind(self, module: str) -> Adding | None:
        """What it adds at a linear module; `None`: nothing."""
        placed = self._linear.get(module)
        return None if placed is None else placed.add_

    def load(self) -> ExpertLoad:
        """What its routers have decided so far; any thread may ask, while steps go on."""
        return self._tally.read()

    def release(self) -> None:
        """Let go of the tensors, once no later step can use them."""
        # Layers still hold what they bound for the last step, and an idle engine may not take another soon.
        for placed in (*self._linear.values(), *self.blocks.values()):
            vars(placed).clear()
        self._linear.clear()
        self.blocks.clear()


def place(
    model: SparseModel, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> SparseSlot:
    """Copy a model to the device: factors in `dtype`, routers in float32, each module in the layout that
    makes it cheap."""
    tally = Tally(_experts(model), device)
    linear: dict[str, PlacedLinear] = {
        path: _plain(pair, device, dtype) for path, pair in model.plain.items()
    }
    every = max(1, len(model.linear) // WATCHED)
    for number, (path, mixture) in enumerate(model.linear.items()):
        placed = _mixture(mixture, device, dtype)
        if number % every == 0 and number < every * WATCHED and not isinstance(placed, Ungated):
            is_choice = isinstance(mixture, ExpertMixture) and mixture.top_k is not None
            placed.watch = partial(_count, tally, is_choice)
        linear[path] = placed
    blocks = {path: PlacedFfn.place(mixture, tally, device, dtype) for path, mixture in model.ffn.items()}
    return SparseSlot(linear, blocks, tally)


def _count(tally: Tally, is_choice: bool, gate: Tensor) -> None:
    tally.add(gate > 0 if is_choice else gate, gate)


def _plain(pair: LoraPair, device: torch.device | str, dtype: torch.dtype) -> Ungated:
    return Ungated(pair.a.to(device, dtype), pair.b.to(device), pair.scale)


def _mixture(
    mixture: RankMixture | ExpertMixture, device: torch.device | str, dtype: torch.dtype
) -> RankGated | ExpertGated | Ungated:
    if isinstance(mixture, ExpertMixture):
        factors = mixture.factors
        return ExpertGated(
            list(factors.a.to(device, dtype)),
            list(factors.b.to(device)),
            [factors.scale] * factors.experts,
            mixture.router.to(device),
            ExpertGate(mixture.top_k),
        )
    a, b, factor = mixture.a.to(device, dtype), mixture.b.to(device), mixture.scale * mixture.gain
    if mixture.router is None:  # trained without one: a constant stands in for the gate of every rank
        return Ungated(a, b, factor * mixture.bypass)
    router = mixture.router.to(device)
    return RankGated(a, b, router, mixture.experts, factor, mixture.temperature)


def _experts(model: SparseModel) -> int:
    """How many its routers choose among, at most."""
    counts = [block.experts for block in model.ffn.values()]
    counts += [
        mixture.a.shape[0] if isinstance(mixture, RankMixture) else mixture.factors.experts
        for mixture in model.linear.values()
    ]
    return max(counts, default=0)
