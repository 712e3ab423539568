"""The experts of a set as each method needs them."""

from collections.abc import Sequence

import torch

from loramux.adapters.lora import LoraAdapter
from loramux.adapters.sparse.arrow import ArrowExperts
from loramux.adapters.sparse.spectr import SpectrExperts
from loramux.adapters.sparse.token_experts import TokenExperts
from loramux.adapters.sparse.token_mixtures import TokenMethod


def token_experts(
    method: TokenMethod,
    experts: Sequence[LoraAdapter],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TokenExperts:
    """Made ready on the device, factors in `dtype`, whatever type the experts have.

    Raises:
        BlendError, BaseMismatchError: as the method's own class.
    """
    made = ArrowExperts if method is TokenMethod.ARROW else SpectrExperts
    return made([expert.to(dtype) for expert in experts], device=device, dtype=dtype)
