"""Arrow's prototypes: the direction of the input space that an expert amplifies most."""

import torch
from torch import Tensor

STEPS = 15
_TINY = 1e-8


def prototypes(a: Tensor, b: Tensor, seed: int = 0) -> Tensor:
    """The top right singular vector of each B A: 15 power iterations from a random start, as PEFT does it.

    The products are `Aᵀ((BᵀB)(Av))`, so neither BA nor its square is formed.

    Args:
        a: `[..., r, in]`; b: `[..., out, r]`.
        seed: of the start, which is the same for all experts and modules of one width.

    Returns:
        `[..., in]` float32 of length 1, the sign arbitrary.
    """
    a, b = a.float(), b.float()
    inner = b.mT @ b
    generator = torch.Generator(device=a.device).manual_seed(seed)
    start = torch.randn(a.shape[-1], device=a.device, generator=generator)
    v: Tensor = (start / start.norm())[:, None].expand(*a.shape[:-2], -1, 1)
    for _ in range(STEPS):
        v = a.mT @ (inner @ (a @ v))
        v = v / (v.norm(dim=-2, keepdim=True) + _TINY)
    return v[..., 0]
