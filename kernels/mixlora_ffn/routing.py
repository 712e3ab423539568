"""What a MixLoRA router decides, from its logits: which expert serves which token, with what weight.

Everything is float32 (float64 for float64 logits), whatever the model computes in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad


@dataclass(frozen=True, eq=False)
class Routes:
    """The decision for T tokens and E experts.

    Attributes:
        weights: `[T, E]`; what the expert's output is multiplied by, zero where it does not serve the token.
        chosen: `[T, E]` bool.
        passed: `[T]`; the factor with which a token's own input is added (a dropped token of `switch`);
            `None` where no strategy can drop any.
        sums_to_one: whether the weights of every token do.
    """

    weights: Tensor
    chosen: Tensor
    passed: Tensor | None = None
    sums_to_one: bool = False

    def __getitem__(self, tokens: slice) -> "Routes":
        passed = None if self.passed is None else self.passed[tokens]
        return Routes(self.weights[tokens], self.chosen[tokens], passed, self.sums_to_one)


def probabilities(logits: Tensor) -> Tensor:
    """Softmax over the experts, `[T, E]`."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.softmax(-1, dtype=wide)


def top_k(p: Tensor, k: int) -> Routes:
    """The k most probable experts, their probabilities divided by their sum (MixLoRA, eq. 5)."""
    best, experts = p.topk(min(k, p.shape[-1]), dim=-1)
    weights = torch.zeros_like(p).scatter_(-1, experts, best / best.sum(-1, keepdim=True))
    chosen = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, experts, True)
    return Routes(weights, chosen, sums_to_one=True)


def top_p(p: Tensor, limit: float, temperature: float = 0.0) -> Routes:
    """The most probable experts up to and including the one whose running sum exceeds `limit`.

    A temperature above 0 divides the probabilities, not the logits, and the weights are not normalised again:
    so the published models were trained.
    """
    if temperature > 0:
        p = p / temperature
    falling, experts = p.sort(dim=-1, descending=True)
    before = pad(falling.cumsum(-1)[..., :-1], (1, 0))
    kept = before <= limit
    chosen = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, experts, kept)
    return Routes(p * chosen, chosen)


def switch(p: Tensor, capacity: int | None = None, lengths: Sequence[int] = ()) -> Routes:
    """The most probable expert, weighted with its probability.

    With a capacity, an expert serves that many tokens of a sequence, counted from its first one; every
    further token is dropped: its own input, times the probability, takes the place of the expert's output.

    Args:
        lengths: tokens of each sequence, in order; read only with a capacity. Default: one sequence.
    """
    best, experts = p.max(-1)
    chosen = one_hot(experts, p.shape[-1]).bool()
    if capacity is None:
        return Routes(best[:, None] * chosen, chosen)
    sequences = torch.split_with_sizes(chosen, list(lengths) or [p.shape[0]])
    places = torch.cat([part.cumsum(0) for part in sequences])
    chosen = chosen & (places <= capacity)
    dropped = ~chosen.any(-1)
    return Routes(best[:, None] * chosen, chosen, passed=best * dropped)
