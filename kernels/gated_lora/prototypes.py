"""Arrow's prototypes: the direction of the input space that an expert amplifies most."""

import torch
from torch import Tensor

STEPS = 15
_TINY = 1e-8


def prototype(a: Tensor, b: Tensor, seed: int = 0) -> Tensor:
    """The top right singular vector of B A, by 15 power iterations from a random start, as PEFT takes it.

    The products are `Aᵀ((BᵀB)(Av))`, so neither BA nor its square is formed.

    Args:
        a: `[r, in]`; b: `[out, r]`.
        seed: of the start; one seed gives all experts of a module one start.

    Returns:
        `[in]` float32 of length 1, its sign arbitrary.
    """
    a, b = a.float(), b.float()
    inner = b.T @ b
    generator = torch.Generator(device=a.device).manual_seed(seed)
    v = torch.randn(a.shape[1], device=a.device, generator=generator)
    v /= v.norm() + _TINY
    for _ in range(STEPS):
        v = a.T @ (inner @ (a @ v))
        v /= v.norm() + _TINY
    return v
