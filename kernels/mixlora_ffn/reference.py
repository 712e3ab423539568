"""The operator as its formula says, each expert a whole feed-forward block: for tests and comparisons."""

from collections.abc import Mapping

import torch
from torch import Tensor

from loramux.kernels.mixlora_ffn.ffn import Factors, Ffn, Linear
from loramux.kernels.mixlora_ffn.routing import Routes


def mixlora_ffn_reference(x: Tensor, ffn: Ffn, projections: Mapping[str, Factors], routes: Routes) -> Tensor:
    """`Σ_e w_e FFN_e(x)`, every projection of FFN_e being `W x + scale B_e A_e x`; `[T, hidden]`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros_like(x, dtype=wide)
    for expert in range(routes.weights.shape[1]):
        tokens = routes.chosen[:, expert].nonzero()[:, 0]
        if not len(tokens):
            continue
        mine = x[tokens]
        parts = [_adapted(linear, mine, projections.get(n), expert) for n, linear in ffn.first.items()]
        name, last = ffn.last
        out = _adapted(last, ffn.activate(parts), projections.get(name), expert)
        y.index_add_(0, tokens, routes.weights[tokens, expert, None] * out.to(wide))
    if routes.passed is not None:
        y += routes.passed[:, None] * x.to(wide)
    return y.to(x.dtype)


def _adapted(linear: Linear, x: Tensor, factors: Factors | None, expert: int) -> Tensor:
    y = linear(x)
    if factors is None:
        return y
    a, b = factors.a[expert].to(x.dtype), factors.b[expert].to(x.dtype)
    return y + factors.scale * ((x @ a.T) @ b.T)
