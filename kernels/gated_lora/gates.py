"""Gates that depend on the token: `y += B(g(x) ⊙ Ax)` with g from a router that is read in the same product
as A.

The gates themselves are pure; `RankGated` and `ExpertGated` hold the factors of one module in the layout that
makes them cheap. Routers, softmax and gates are float32 whatever the factors are.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from loramux.kernels.gated_lora.native_tokens import NativeTokens, can_serve

#: Told the gate of some tokens, [T, parts].
Watch = Callable[[Tensor], None]


def rank_gate(logits: Tensor, experts: int) -> Tensor:
    """LoRACoE: `mean_i softmax(logits_i)` over the rank; logits [T, experts * r], the result [T, r]."""
    return logits.view(-1, experts, logits.shape[1] // experts).softmax(-1).mean(-2)


@dataclass(frozen=True, slots=True)
class ExpertGate:
    """Products with the router [T, E] -> factors [T, E]: the softmax over the k best experts of a token, all
    of them by default, and 0 for the others.

    LoRAMoE takes all. MoLA takes k, whose probabilities divided by their sum are the softmax over their
    logits alone. Arrow takes the k with the largest magnitude, SpectR those with the largest norm.
    """

    k: int | None = None
    temperature: float = 1.0
    magnitude: bool = False

    def __call__(self, products: Tensor) -> Tensor:
        scores = products.abs() if self.magnitude else products
        if self.k is None:
            return (scores / self.temperature).softmax(-1)
        best, at = scores.topk(min(self.k, scores.shape[-1]), dim=-1)
        return torch.zeros_like(scores).scatter_(-1, at, (best / self.temperature).softmax(-1))


def block_norms(hidden: Tensor, owner: Tensor, experts: int, *, even: bool = False) -> Tensor:
    """The length of every expert's block of A x: hidden [T, Σr], and the expert of each column, -> [T, E], in
    float32 at least. `even`: all experts are of one rank, which is one operation."""
    wide = _wide(hidden)
    if even:
        tokens, rows = wide.shape
        norms: Tensor = torch.linalg.vector_norm(wide.reshape(tokens, experts, rows // experts), dim=-1)
        return norms
    squares = wide.square()
    return squares.new_zeros(hidden.shape[0], experts).index_add_(-1, owner, squares).sqrt_()


class Shrink:
    """x -> (A x, router x). One product where A is float32 too, two where it is narrower than the router;
    without a router, A x and nothing."""

    def __init__(self, a: Tensor, router: Tensor | None) -> None:
        self._rank = a.shape[0]
        self._router: Tensor | None = None
        if router is None:
            self._stacked = a
        elif a.dtype == router.dtype:
            self._stacked = torch.cat([a, router])
        else:
            self._stacked, self._router = a, router

    @property
    def stacked(self) -> Tensor | None:
        """[r + logits, in], A first, where they lie in one tensor."""
        return self._stacked if self._router is None else None

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
        self._native = _native(self._shrink, self._bt, None, experts)
        self.watch: Watch | None = None

    @property
    def nbytes(self) -> int:
        return self._shrink.nbytes + self._bt.nbytes

    def add_(self, y: Tensor, x: Tensor) -> None:
        """Add to y [T, out] in place, given x [T, in]."""
        if self._native is not None and self._native.takes(y, x):
            gate = self._native.add_(y, x)
        else:
            hidden, logits = self._shrink(x)
            gate = rank_gate(logits, self._experts)
            _expand_(y, hidden * gate, self._bt)
        if self.watch is not None:
            self.watch(gate)


class ExpertGated:
    """LoRAMoE, MoLA, Arrow and SpectR at one module: `y += Σ_e g_e(x) B_e A_e x`, without one output per
    expert.

    Experts may differ in rank.

    Args:
        a: per expert `[r_e, in]`; b: per expert `[out, r_e]`; scales: one per expert, folded into B.
        router: `[E, in]`; `None`: what the gate is of are the norms ‖A_e x‖, as precise as A x is.
    """

    def __init__(
        self,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        scales: Sequence[float],
        router: Tensor | None,
        gate: ExpertGate,
    ) -> None:
        self._by_norm = router is None
        self._shrink = Shrink(torch.cat(list(a)), None if router is None else _wide(router))
        pairs = zip(b, scales, strict=True)
        self._bt = torch.cat([_scaled(factor.T, scale, a[0].dtype) for factor, scale in pairs])
        owners = [torch.full((factor.shape[0],), i, dtype=torch.int32) for i, factor in enumerate(a)]
        self._owner = torch.cat(owners).to(a[0].device)  # the expert of a row
        self._experts = len(a)
        self._even = len({factor.shape[0] for factor in a}) == 1
        self.watch: Watch | None = None
        self._set_gate(gate)

    def with_gate(self, gate: ExpertGate) -> "ExpertGated":
        """The same factors, gated otherwise; nothing is copied."""
        other = copy(self)
        other._set_gate(gate)
        return other

    def _set_gate(self, gate: ExpertGate) -> None:
        self._gate = gate
        self._native = _native(self._shrink, self._bt, self._owner, self._experts, gate)

    @property
    def nbytes(self) -> int:
        return self._shrink.nbytes + self._bt.nbytes

    def add_(self, y: Tensor, x: Tensor) -> None:
        """Add to y [T, out] in place, given x [T, in]."""
        if self._native is not None and self._native.takes(y, x):
            gate = self._native.add_(y, x)
        else:
            hidden, products = self._shrink(x)
            if self._by_norm:
                products = block_norms(hidden, self._owner, self._experts, even=self._even)
            gate = self._gate(products)
            _expand_(y, hidden * gate.index_select(-1, self._owner), self._bt)
        if self.watch is not None:
            self.watch(gate)


class Ungated:
    """An ordinary LoRA that every token uses: `y += factor * B A x`."""

    def __init__(self, a: Tensor, b: Tensor, factor: float) -> None:
        self._a = a
        self._bt = _scaled(b.T, factor, a.dtype)
        self._native = NativeTokens(a, self._bt, None, 0) if can_serve(a, self._bt, None, 0) else None

    @property
    def nbytes(self) -> int:
        return self._a.nbytes + self._bt.nbytes

    def add_(self, y: Tensor, x: Tensor) -> None:
        """Add to y [T, out] in place, given x [T, in]."""
        if self._native is not None and self._native.takes(y, x):
            self._native.add_(y, x)
            return
        _expand_(y, linear(x.to(self._a.dtype), self._a), self._bt)


def _native(
    shrink: Shrink, bt: Tensor, owner: Tensor | None, experts: int, gate: ExpertGate | None = None
) -> NativeTokens | None:
    """The form in C++, where there is one."""
    stacked = shrink.stacked
    if stacked is None or not can_serve(stacked, bt, owner, experts):
        return None
    if gate is None:
        return NativeTokens(stacked, bt, None, experts)
    scale = 1 / gate.temperature
    return NativeTokens(stacked, bt, owner, experts, k=gate.k or 0, scale=scale, magnitude=gate.magnitude)


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
