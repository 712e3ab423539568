"""What the experts of a block hand to the base's last projection."""

from typing import NamedTuple

from torch import Tensor


class Mixed(NamedTuple):
    """What the experts made of some tokens.

    Attributes:
        hidden: `Σ_e w_e h_e`, `[T, ffn]`, the input of the base's last projection.
        low: `w_e A2_e h_e`, `[T, E * r]`, for the experts' part of it; `None` if they have none.
    """

    hidden: Tensor
    low: Tensor | None
