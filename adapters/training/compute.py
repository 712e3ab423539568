"""What a frozen base computes in while it is trained on: float32, or bfloat16 on a CPU that has it."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from loramux.adapters.training.errors import OptionError

#: Names of `--dtype`.
CHOICES = ("auto", "float32", "bfloat16")
#: Products in bfloat16 have to be this much faster: what is around them gains less, and it has fewer bits.
_WORTH = 1.5
#: Tokens and width of the products that are measured. A training step multiplies hundreds of tokens.
_TOKENS, _WIDTH = 256, 768
#: The best of so many counts: on a busy machine most are interrupted.
_ROUNDS = 25


class Compute(NamedTuple):
    """What products are computed in, and why, for a line of the output."""

    dtype: torch.dtype
    why: str


class Speeds(NamedTuple):
    """Multiplications and additions a second of one product on one thread."""

    float32: float
    bfloat16: float


@torch.inference_mode()
def measure() -> Speeds:
    """The speed of a training step's products in both types; takes a tenth of a second at most where bfloat16
    is worth having, and stops after a few rounds where it is not. One thread, which waits for no other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure()
    finally:
        torch.set_num_threads(threads)


def _measure() -> Speeds:
    x, weight = torch.ones(_TOKENS, _WIDTH), torch.full((_WIDTH, _WIDTH), 0.01)
    pairs = [(x, weight), (x.bfloat16(), weight.bfloat16())]
    best = [float("inf"), float("inf")]
    for turn in range(_ROUNDS + 1):
        for place, (left, right) in enumerate(pairs):
            started = time.perf_counter()
            nn.functional.linear(left, right)
            if turn:  # the first product of a type makes its kernel
                best[place] = min(best[place], time.perf_counter() - started)
        if turn > 2 and best[1] > 4 * best[0]:
            break
    return Speeds(*(_TOKENS * _WIDTH * _WIDTH / seconds for seconds in best))


def choose(wanted: str, *, measured: bool) -> Compute | None:
    """The type to compute in: as wanted, else as measured; None where nothing may be chosen under `auto`.

    Args:
        wanted: one of `CHOICES`.
        measured: whether `auto` is what a measurement of this CPU recommends.

    Raises:
        OptionError: no such type.
    """
    if wanted not in CHOICES:
        raise OptionError(f"dtype must be {', '.join(CHOICES)}, got {wanted!r}")
    if wanted != "auto":
        return Compute(getattr(torch, wanted), "as asked")
    if not measured:
        return None
    return recommend(measure())


def recommend(speeds: Speeds) -> Compute:
    """bfloat16 where its products are faster by half or more."""
    half = speeds.bfloat16 > _WORTH * speeds.float32
    why = (
        f"{_TOKENS} tokens times a matrix: {speeds.bfloat16 / 1e9:.0f} G multiplications a second in "
        f"bfloat16, {speeds.float32 / 1e9:.0f} in float32"
    )
    return Compute(torch.bfloat16 if half else torch.float32, why)


def hold(model: Any, dtype: torch.dtype) -> None:
    """Keep the matrices of a frozen base in a type; embeddings and norms stay what they are.

    An output matrix that is the embeddings' gets values of its own.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
    if dtype != torch.float32 and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(_ATTENTION)


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention in float32: its backward pass on a CPU takes almost three times as long in bfloat16."""
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    with exact():
        y, _ = sdpa_attention_forward(module, q.float(), k.float(), v.float(), mask, **options)
    return y.to(q.dtype), None


_ATTENTION = "sdpa_float32"
AttentionInterface.register(_ATTENTION, _attend)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def mark(model: Any) -> str:
    """What tells a run on this base from one that computes in float32; empty for that and on a GPU."""
    return " bfloat16" if _narrow(model) else ""


def _narrow(model: Any) -> bool:
    weight: Tensor = model.get_output_embeddings().weight
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16


def computing(model: Any) -> AbstractContextManager[object]:
    """What a forward pass runs in: where a CPU holds its matrices in bfloat16, activations between products
    are bfloat16 as well; norms, routers, softmax, loss and everything that is trained stay float32."""
    return torch.autocast("cpu", torch.bfloat16) if _narrow(model) else nullcontext()


def wide(x: Tensor) -> Tensor:
    """float32, unless products narrow it again at once."""
    return x if torch.is_autocast_enabled("cpu") else x.float()


def exact() -> AbstractContextManager[object]:
    """Products inside are computed in what their inputs are in."""
    return torch.autocast("cpu", enabled=False)
