"""What routers decide, counted cheaply: written by the steps, read by whoever asks."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.special import entr


class ExpertLoad(NamedTuple):
    """What the routers of a sparse model have decided so far.

    Attributes:
        tokens: for every expert the tokens it served, summed over the routers that are counted. Where every
            expert serves every token, its share of them by weight; for LoRACoE, whose experts are the single
            ranks, by rank.
        mean_entropy: of a decision, in nats; 0 before the first one.
    """

    tokens: tuple[int, ...]
    mean_entropy: float


class Tally:
    """Sums on the device, so that counting waits for nothing and can be captured. One thread adds, any may
    read."""

    def __init__(self, experts: int, device: torch.device | str) -> None:
        self._tokens = torch.zeros(experts, dtype=torch.float64, device=device)
        self._entropy = torch.zeros((), dtype=torch.float64, device=device)
        self._decisions = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, served: Tensor, probabilities: Tensor) -> None:
        """Count T decisions: what each expert served [T, e], and the distribution it was chosen from
        [T, e]; e is no more than the tally has experts."""
        self._tokens[: served.shape[1]] += served.sum(0)
        self._entropy += entr(probabilities).sum()
        self._decisions += len(served)

    def read(self) -> ExpertLoad:
        """The sums so far."""
        tokens = tuple(round(value) for value in self._tokens.tolist())
        return ExpertLoad(tokens, float(self._entropy) / max(1, int(self._decisions)))
