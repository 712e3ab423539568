"""The operator with every base projection run once a token.

The first projections are shared because all experts read the same x. The last one is shared because it is
linear: `Σ_e w_e (W2 h_e + ΔW2_e h_e) = W2 (Σ_e w_e h_e) + Σ_e w_e ΔW2_e h_e`. What is left for an expert
are its low-rank products and the activation between them. A bias of W2 comes in once, which is right where
the weights of a token sum to one and is corrected where they do not.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import linear

from loramux.kernels.gated_lora.plain import expand
from loramux.kernels.mixlora_ffn import native
from loramux.kernels.mixlora_ffn.ffn import Experts, Ffn
from loramux.kernels.mixlora_ffn.mixed import Mixed
from loramux.kernels.mixlora_ffn.routing import Routes

#: Tokens that are in work at a time: large enough for the base's products to run at full speed, small enough
#: to bound the memory of the activations and to keep them in the processor's cache.
TOKENS_AT_ONCE = {"cpu": 128}
TOKENS_AT_ONCE_ELSEWHERE = 1024


def mixlora_ffn(x: Tensor, ffn: Ffn, experts: Experts, routes: Routes) -> Tensor:
    """`Σ_e w_e FFN_e(x)`, `[T, hidden]`, equal to `mixlora_ffn_reference` up to rounding.

    Sums over experts are float32. Some tokens at a time, so that the memory beyond input and output does
    not grow with T.
    """
    step = TOKENS_AT_ONCE.get(x.device.type, TOKENS_AT_ONCE_ELSEWHERE)
    if x.shape[0] <= step:
        return _mixlora_ffn(x, ffn, experts, routes)
    y = torch.empty_like(x)
    for start in range(0, x.shape[0], step):
        tokens = slice(start, start + step)
        y[tokens] = _mixlora_ffn(x[tokens], ffn, experts, routes[tokens])
    return y


def _mixlora_ffn(x: Tensor, ffn: Ffn, experts: Experts, routes: Routes) -> Tensor:
    first = {name: projection(x) for name, projection in ffn.first.items()}
    mixed = mix(x, first, ffn, experts, routes)
    del first
    return finish(x, ffn.last[1](mixed.hidden), mixed, ffn, experts, routes)


def mix(x: Tensor, first: dict[str, Tensor], ffn: Ffn, experts: Experts, routes: Routes) -> Mixed:
    """Everything between the first projections of the base, whose outputs are given, and its last one."""
    if x.is_cuda and find_spec("triton") is not None:
        from loramux.kernels.mixlora_ffn import triton  # compiles, and needs triton

        if triton.takes(ffn, x):
            return triton.mix(x, first, ffn, experts, routes)
    if native.takes(x, first, ffn, experts):
        return native.mix(x, first, ffn, experts, routes)
    return _mix_grouped(x, first, ffn, experts, routes)


def finish(x: Tensor, y: Tensor, mixed: Mixed, ffn: Ffn, experts: Experts, routes: Routes) -> Tensor:
    """Add to the output `y` of the base's last projection what it does not hold yet."""
    bias_share = None
    if ffn.bias is not None and not routes.sums_to_one:
        bias_share = (routes.weights.sum(-1, keepdim=True) - 1) * ffn.bias
    if mixed.low is None and bias_share is None and routes.passed is None:
        return y
    wide = torch.promote_types(y.dtype, torch.float32)
    total = y.to(wide)
    if mixed.low is not None and experts.last_bt is not None:
        total = expand(total, mixed.low.to(wide), experts.last_bt.to(wide))
    if bias_share is not None:
        total = total + bias_share
    if routes.passed is not None:
        total = total + routes.passed[:, None] * x.to(wide)
    return total.to(y.dtype)


def _mix_grouped(x: Tensor, first: dict[str, Tensor], ffn: Ffn, experts: Experts, routes: Routes) -> Mixed:
    groups = _groups(routes.chosen)
    low = None if experts.shrink is None else linear(x, experts.shrink)
    hidden: Tensor | None = None
    last: Tensor | None = None
    if experts.last_a is not None:
        count, rank, _ = experts.last_a.shape
        last = torch.zeros(x.shape[0], count, rank, dtype=routes.weights.dtype, device=x.device)
    for expert, tokens in enumerate(groups):
        if not len(tokens):
            continue
        weights = routes.weights[tokens, expert, None]
        parts = []
        for name, base in first.items():
            part = base.index_select(0, tokens)
            spread = experts.first.get(name)
            if spread is not None and low is not None:
                rank = spread.bt.shape[1]
                at = spread.columns.start + expert * rank
                part.addmm_(low[:, at : at + rank].index_select(0, tokens), spread.bt[expert])
            parts.append(part)
        h = ffn.activate(parts)
        if last is not None and experts.last_a is not None:
            last[tokens, expert] = linear(h, experts.last_a[expert]) * weights
        if hidden is None:
            hidden = torch.zeros(x.shape[0], h.shape[1], dtype=weights.dtype, device=x.device)
        hidden.index_add_(0, tokens, h.mul_(weights) if h.dtype == weights.dtype else h * weights)
    if hidden is None:
        hidden = torch.zeros_like(ffn.activate(list(first.values())))
    return Mixed(hidden.to(x.dtype), None if last is None else last.flatten(1))


def _groups(chosen: Tensor) -> Sequence[Tensor]:
    """The tokens of every expert, sorted by expert in one pass."""
    _, tokens = chosen.T.nonzero(as_tuple=True)
    return torch.split_with_sizes(tokens, chosen.sum(0).tolist())
