"""Gates that depend on the token: `y += B(g(x) ⊙ Ax)` with g from a router that is read in the same product
as A.

The gate functions are pure; `RankGated` and `ExpertGated` hold the factors of one module in the layout that
makes them cheap. Routers, softmax and gates are float32 whatever the factors are.
"""

from collections.abc import Callable, Sequence
from copy import copy

import torch
from torch import Tensor
from torch.nn.functional import linear

#: Told the gate of some tokens, [T, parts].
Watch = Callable[[Tensor], None]


def rank_gate(logits: Tensor, experts: int) -> Tensor:
    """LoRACoE: `mean_i softmax(logits_i)` over the rank; logits [T, experts * r], the result [T, r]."""
    return logits.view(-1, experts, logits.shape[1] // experts).softmax(-1).mean(-2)


def dense_softmax(logits: Tensor) -> Tensor:
    """LoRAMoE: every expert takes part; [T, E]."""
    return logits.softmax(-1)


def top_k_softmax(logits: Tensor, k: int) -> Tensor:
    """MoLA: the k best experts, their probabilities divided by their sum; [T, E].

    That equals the softmax over their logits alone.
    """
    return _softmax_of_best(logits, k)


def arrow_gate(products: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """Arrow: softmax(|x · v_e| / temperature) over the k experts where |x · v_e| is largest; [T, E]."""
    return _softmax_of_best(products.abs(), k, temperature)


def _softmax_of_best(scores: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    best, at = scores.topk(min(k, scores.shape[-1]), dim=-1)
    return torch.zeros_like(scores).scatter_(-1, at, (best / temperature).softmax(-1))


class Shrink:
    """x -> (A x, router x). One product where A is float32 too, two where it is narrower than the router."""

    def __init__(self, a: Tensor, router: Tensor) -> None:
        self._rank = a.shape[0]
        self._router: Tensor | None = None
        if a.dtype == router.dtype:
            self._stacked = torch.cat([a, router])
        else:
            self._stacked, self._router = a, router

    @property
    def nbytes(self) -> int:
        return self._stacked.nbytes + (0 if self._router is None else self._router.nbytes)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        both = linear(x if x.dtype == self._stacked.dtype else x.to(self._stacked.dtype), self._stacked)
        if self._router is None:
            return both[:, : self._rank], both[:, self._rank :]
        return both, linear(x.to(self._router.dtype), self._router)


class RankGated:
    """LoRACoE at one module: `y += scale * gain * B(ḡ ⊙ Ax)`, ḡ = mean_i softmax(W_i x / temperature).

    Args:
        a: `[r, in]`; b: `[out, r]`; both are kept as they are on device and in dtype.
        router: `[experts * r, in]`, expert after expert.
        factor: scale times gain, folded into B.
    """

    def __init__(
        self, a: Tensor, b: Tensor, router: Tensor, experts: int, factor: float, temperature: float = 1.0
    ) -> None:
        self._shrink = Shrink(a, _wide(router) / temperature)
        self._bt = _scaled(b.T, factor, a.dtype)
        self._experts = experts
        self.watch: Watch | None = None

    @property
    def nbytes(self) -> int:
        return self._shrink.nbytes + self._bt.nbytes

    def add_(self, y: Tensor, x: Tensor) -> None:
        """Add to y [T, out] in place, given x [T, in]."""
        hidden, logits = self._shrink(x)
        gate = rank_gate(logits, self._experts)
        if self.watch is not None:
            self.watch(gate)
        _expand_(y, hidden * gate, self._bt)


class ExpertGated:
    """LoRAMoE, MoLA and Arrow at one module: `y += Σ_e g_e(x) B_e A_e x`, without one output per expert.

    Experts may differ in rank.

    Args:
        a: per expert `[r_e, in]`; b: per expert `[out, r_e]`; scales: one per expert, folded into B.
        router: `[E, in]`.
        gate: `[T, E]` products with the router -> `[T, E]` factors.
    """

    def __init__(
        self,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        scales: Sequence[float],
        router: Tensor,
        gate: Callable[[Tensor], Tensor],
    ) -> None:
        self._shrink = Shrink(torch.cat(list(a)), _wide(router))
        pairs = zip(b, scales, strict=True)
        self._bt = torch.cat([_scaled(factor.T, scale, a[0].dtype) for factor, scale in pairs])
        owners = [torch.full((factor.shape[0],), i) for i, factor in enumerate(a)]
        self._owner = torch.cat(owners).to(router.device)  # the expert of a row
        self._gate = gate
        self.watch: Watch | None = None

    def with_gate(self, gate: Callable[[Tensor], Tensor]) -> "ExpertGated":
        """The same factors, gated otherwise; nothing is copied."""
        other = copy(self)
        other._gate = gate
        return other

    @property
    def nbytes(self) -> int:
        return self._shrink.nbytes + self._bt.nbytes

    def add_(self, y: Tensor, x: Tensor) -> None:
        """Add to y [T, out] in place, given x [T, in]."""
        hidden, products = self._shrink(x)
        gate = self._gate(products)
        if self.watch is not None:
            self.watch(gate)
        _expand_(y, hidden * gate.index_select(-1, self._owner), self._bt)


class Ungated:
    """An ordinary LoRA that every token uses: `y += factor * B A x`."""

    def __init__(self, a: Tensor, b: Tensor, factor: float) -> None:
        self._a = a
        self._bt = _scaled(b.T, factor, a.dtype)

    @property
    def nbytes(self) -> int:
        return self._a.nbytes + self._bt.nbytes

    def add_(self, y: Tensor, x: Tensor) -> None:
        """Add to y [T, out] in place, given x [T, in]."""
        _expand_(y, linear(x.to(self._a.dtype), self._a), self._bt)


def _wide(router: Tensor) -> Tensor:
    return router.to(torch.promote_types(router.dtype, torch.float32))


def _scaled(bt: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """B transposed [r, out] with its factor in it, rounded once."""
    return (_wide(bt) * factor).to(dtype).contiguous()


def _expand_(y: Tensor, hidden: Tensor, bt: Tensor) -> None:
    if y.dtype == bt.dtype:
        y.addmm_(hidden.to(bt.dtype), bt)
    else:
        y += (hidden.to(bt.dtype) @ bt).to(y.dtype)
