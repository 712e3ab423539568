"""How strongly each expert of a pool answers one input: the signals of LoGo.

Lee et al., "LoRA on the Go: Instance-level Dynamic LoRA Selection and Merging" (ACL 2026, arXiv 2511.07129):
at one projection of one block, the query's of the last in the authors' code, the output of every expert for
the prompt's last token is o_i = ΔW_i h; its signal s_i is ‖o_i‖₂, or one over the entropy of the softmax of
o_i. Of the k largest the weights are s_i / Σ s.

Two things differ from the authors' code. There h comes from a pass in which every expert of the pool is added
at once, here from the base alone: it does not depend on who else is loaded, and shares the base's cached keys
and values. And there h is the residual stream before the block's norm, here what the projection reads.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from loramux.adapters.errors import BlendError
from loramux.adapters.lora import LoraAdapter
from loramux.kernels.gated_lora import Adding

Signal = Literal["norm", "entropy"]
#: Projections by their last names, those first that are asked first; then any other.
_PREFERRED = ("q_proj", "qkv_proj", "query_key_value", "v_proj", "k_proj", "o_proj")
#: Keeps an output that is all in one place from an infinite signal, as the authors have it.
_LEAST_ENTROPY = 1e-6


class Listener:
    """A slot that adds nothing and keeps what one module reads of the last token that passes.

    What it computes is the base, so that its keys and values may be shared with the base's.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._heard: Tensor | None = None

    @property
    def modules(self) -> Collection[str]:
        """The one module that it listens at."""
        return (self._module,)

    def bind(self, module: str) -> Adding | None:
        """What listens at a module."""
        return self._listen if module == self._module else None

    def heard(self) -> Tensor | None:
        """The input of the last token, `[in]` float32 on the host; `None` where no token came by."""
        return None if self._heard is None else self._heard.float().cpu()

    def _listen(self, _: Tensor, x: Tensor) -> None:
        self._heard = x[-1].clone()


class Responders:
    """The experts of a pool at one module, stacked, in float32 on the host.

    Args:
        experts: every one has the module.
    """

    def __init__(self, experts: Sequence[LoraAdapter], module: str) -> None:
        pairs = [expert.pairs[module] for expert in experts]
        rank = max(pair.rank for pair in pairs)
        self._a = torch.stack([_padded(pair.a.float(), rank) for pair in pairs])  # [experts, rank, in]
        self._bt = torch.stack([_padded(pair.b.float().T * pair.scale, rank) for pair in pairs])

    def outputs(self, x: Tensor) -> Tensor:
        """ΔW_e x of every expert: `[in]` -> `[experts, out]`."""
        hidden = self._a @ x
        return torch.bmm(hidden[:, None, :], self._bt)[:, 0]

    def signals(self, x: Tensor, signal: Signal) -> list[float]:
        """Of every expert, in the order in which they were given; not negative."""
        outputs = self.outputs(x)
        if signal == "norm":
            found = torch.linalg.vector_norm(outputs, dim=1)
        else:
            chances = outputs.log_softmax(1)
            found = 1 / (-(chances.exp() * chances).sum(1) + _LEAST_ENTROPY)
        values: list[float] = found.tolist()
        return values


def _padded(rows: Tensor, rank: int) -> Tensor:
    """With rows of zeros up to `rank`: experts may differ in theirs."""
    return torch.nn.functional.pad(rows, (0, 0, 0, rank - rows.shape[0]))


def common_module(experts: Mapping[str, LoraAdapter]) -> str:
    """Where to ask: in the last block in which the experts have a module in common, at the query projection,
    or the next best.

    Raises:
        BlendError: the experts have no module in common.
    """
    shared = set.intersection(*(set(expert.pairs) for expert in experts.values()))
    if not shared:
        raise BlendError(
            "logo compares the experts at one module, and these have none in common: "
            + ", ".join(sorted(experts)[:8])
        )
    return max(shared, key=_place)


def _place(path: str) -> tuple[int, int, str]:
    """Sorts by block, then by preference, then by name."""
    numbers = re.findall(r"\.(\d+)\.", path)
    name = path.rpartition(".")[2]
    preference = len(_PREFERRED) - _PREFERRED.index(name) if name in _PREFERRED else 0
    return (int(numbers[0]) if numbers else -1, preference, path)
