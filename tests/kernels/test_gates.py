"""Gates that depend on the token against double loops in float64."""

import math

import pytest
import torch
from torch import Tensor

from loramux.kernels.gated_lora.gates import (
    ExpertGate,
    ExpertGated,
    RankGated,
    Ungated,
    rank_gate,
)
from loramux.kernels.gated_lora.native import library
from loramux.kernels.gated_lora.native_tokens import MAX_TOKENS
from loramux.kernels.gated_lora.prototypes import prototypes
from tests.kernels.batches import draw

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def softmax(values: list[float]) -> list[float]:
    exps = [math.exp(value - max(values)) for value in values]
    return [value / sum(exps) for value in exps]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def router_like(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32) * 0.3


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rank", "experts"), [(1, 1), (16, 2), (5, 4)])
def test_loracoe_equals_the_double_loop(rank: int, experts: int, dtype: torch.dtype) -> None:
    tokens, n_in, n_out, factor, temperature = draw(1, 20), 33, 21, 1.7, 1.3
    a, b = torch.randn(rank, n_in).to(dtype), torch.randn(n_out, rank).to(dtype)
    x, base = torch.randn(tokens, n_in).to(dtype), torch.randn(tokens, n_out).to(dtype)
    router = router_like((experts * rank, n_in), dtype)
    wanted = base.double().clone()
    for t in range(tokens):
        hidden = a.double() @ x[t].double()
        logits = (router.double() @ x[t].double() / temperature).tolist()
        for i in range(experts):
            gate = softmax(logits[i * rank : (i + 1) * rank])
            for j in range(rank):
                wanted[t] += factor / experts * gate[j] * hidden[j] * b[:, j].double()
    found = base.clone()
    RankGated(a, b, router, experts, factor, temperature).add_(found, x)
    assert error(found, wanted) < TOLERANCE[dtype]


def test_a_fresh_router_shrinks_the_delta_to_one_part_in_rank_and_the_gain_undoes_it() -> None:
    a, b, x = torch.randn(16, 40).double(), torch.randn(24, 16).double(), torch.randn(7, 40).double()
    fresh = torch.zeros(3 * 16, 40).double()
    delta = x @ a.T @ b.T
    for factor, share in ((1.0, 1 / 16), (16.0, 1.0)):
        found = torch.zeros(7, 24).double()
        RankGated(a, b, fresh, 3, factor).add_(found, x)
        torch.testing.assert_close(found, share * delta)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ranks", [[4, 1, 7, 2, 4], [3] * 5], ids=str)
@pytest.mark.parametrize("method", ["loramoe", "mola", "arrow", "spectr"])
def test_mixtures_of_experts_equal_their_scripts(method: str, dtype: torch.dtype, ranks: list[int]) -> None:
    tokens, n_in, n_out, k = draw(1, 20), 19, 31, 2
    made = {
        "loramoe": ExpertGate(),
        "mola": ExpertGate(k),
        "arrow": ExpertGate(k, temperature=0.8, magnitude=True),
        "spectr": ExpertGate(k, temperature=0.8),
    }
    a = [torch.randn(rank, n_in).to(dtype) for rank in ranks]
    b = [torch.randn(n_out, rank).to(dtype) for rank in ranks]
    scales = [draw(1, 8) / 4 for _ in ranks]
    router = router_like((len(ranks), n_in), dtype)
    x, base = torch.randn(tokens, n_in).to(dtype), torch.randn(tokens, n_out).to(dtype)
    wanted = base.double().clone()
    # As it is rounded: what is tried is the sum, not where a tie falls.
    hidden = torch.nn.functional.linear(x, torch.cat(a)).split(ranks, dim=1)
    for t in range(tokens):
        scores = (router.double() @ x[t].double()).tolist()
        if method == "spectr":
            scores = [float(part[t].double().norm()) for part in hidden]
        if method == "loramoe":
            gates = dict(enumerate(softmax(scores)))
        elif method == "mola":
            p = softmax(scores)
            best = sorted(range(len(p)), key=lambda e: -p[e])[:k]
            gates = {e: p[e] / sum(p[i] for i in best) for e in best}
        else:
            best = sorted(range(len(ranks)), key=lambda e: -abs(scores[e]))[:k]
            gates = dict(zip(best, softmax([abs(scores[e]) / 0.8 for e in best]), strict=True))
        for e, gate in gates.items():
            wanted[t] += gate * scales[e] * (b[e].double() @ (a[e].double() @ x[t].double()))
    found = base.clone()
    ExpertGated(a, b, scales, None if method == "spectr" else router, made[method]).add_(found, x)
    assert error(found, wanted) < TOLERANCE[dtype]


@pytest.mark.skipif(library() is None, reason="the package was installed without a C++ compiler")
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 24, 25, 64])
@pytest.mark.parametrize(
    "gate", ["ranks", ExpertGate(), ExpertGate(3, 0.7), ExpertGate(1, 2.0, magnitude=True)], ids=str
)
@pytest.mark.parametrize("by_norm", [False, True])
def test_the_native_form_equals_the_plain_one_in_float64(
    gate: ExpertGate | str, tokens: int, by_norm: bool
) -> None:
    experts, n_in, n_out = draw(1, 9), draw(1, 300), draw(1, 300)
    ranks = [draw(1, 20) for _ in range(experts)]
    x, y = torch.randn(tokens, n_in), torch.randn(tokens, n_out)

    def layer(dtype: torch.dtype) -> ExpertGated | RankGated:
        if isinstance(gate, ExpertGate):
            pairs = [part.to(dtype) for part in a], [part.to(dtype) for part in b]
            return ExpertGated(*pairs, [0.5] * experts, None if by_norm else router.to(dtype), gate)
        return RankGated(a[0].to(dtype), b[0].to(dtype), router.to(dtype), experts, 1.5, 0.8)

    a = [torch.randn(rank, n_in) / n_in**0.5 for rank in ranks]
    b = [torch.randn(n_out, rank) for rank in ranks]
    logits = experts if isinstance(gate, ExpertGate) else experts * ranks[0]
    router = torch.randn(logits, n_in) / n_in**0.5
    seen: list[Tensor] = []
    native, plain = layer(torch.float32), layer(torch.float64)
    assert native._native is not None
    assert plain._native is None
    native.watch = plain.watch = seen.append
    wide = y.double()
    plain.add_(wide, x.double())
    native.add_(y, x)
    assert error(y, wide) < TOLERANCE[torch.float32]
    torch.testing.assert_close(seen[1].double(), seen[0], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(library() is None, reason="the package was installed without a C++ compiler")
@pytest.mark.parametrize("method", ["loracoe", "loramoe", "mola", "arrow", "spectr", "plain"])
def test_what_a_token_gets_does_not_depend_on_the_others(method: str) -> None:
    """Bit by bit, also beyond what one call takes, and on any number of threads."""
    experts, rank, n_in, n_out = draw(2, 9), draw(1, 12), draw(1, 300), draw(1, 300)
    a = [torch.randn(rank, n_in) for _ in range(experts)]
    b = [torch.randn(n_out, rank) for _ in range(experts)]
    router, scales = torch.randn(experts, n_in), [0.5] * experts
    layer = {
        "loracoe": lambda: RankGated(a[0], b[0], torch.randn(experts * rank, n_in), experts, 1.3),
        "loramoe": lambda: ExpertGated(a, b, scales, router, ExpertGate()),
        "mola": lambda: ExpertGated(a, b, scales, router, ExpertGate(2)),
        "arrow": lambda: ExpertGated(a, b, scales, router, ExpertGate(2, magnitude=True)),
        "spectr": lambda: ExpertGated(a, b, scales, None, ExpertGate(2)),
        "plain": lambda: Ungated(a[0], b[0], 0.7),
    }[method]()
    tokens = MAX_TOKENS + 40
    x, y = torch.randn(tokens, n_in), torch.randn(tokens, n_out)
    whole = y.clone()
    layer.add_(whole, x)
    usual = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            for size in (1, 5, 100):
                parts = y.clone()
                for mine, theirs in zip(parts.split(size), x.split(size), strict=True):
                    layer.add_(mine, theirs)
                assert torch.equal(parts, whole)
        finally:
            torch.set_num_threads(usual)


def test_more_than_all_experts_are_all_experts() -> None:
    logits = torch.randn(4, 3)
    torch.testing.assert_close(ExpertGate(9)(logits), ExpertGate()(logits))


def test_a_plain_lora_is_added_with_its_factor() -> None:
    a, b, x = torch.randn(3, 8).double(), torch.randn(5, 3).double(), torch.randn(6, 8).double()
    found = torch.ones(6, 5).double()
    Ungated(a, b, 0.25).add_(found, x)
    torch.testing.assert_close(found, 1 + 0.25 * x @ a.T @ b.T)
    native = torch.ones(6, 5)
    Ungated(a.float(), b.float(), 0.25).add_(native, x.float())
    assert error(native, found) < TOLERANCE[torch.float32]


def test_gates_are_float32_beside_bfloat16_factors() -> None:
    """Rounded to bfloat16, two experts this close would tie and the first would serve every token."""
    a = [torch.randn(2, 8).bfloat16() for _ in range(2)]
    b = [torch.randn(4, 2).bfloat16() for _ in range(2)]
    seen: list[Tensor] = []
    layer = ExpertGated(a, b, [1.0, 1.0], torch.tensor([[1.0], [1.001]]).expand(2, 8) * 3, ExpertGate())
    layer.watch = seen.append
    layer.add_(torch.zeros(1, 4).bfloat16(), torch.ones(1, 8).bfloat16())
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0], torch.tensor([[-0.012, 0.012]]).softmax(-1), atol=1e-6, rtol=0)


def test_the_gate_of_ranks_sums_to_one() -> None:
    torch.testing.assert_close(rank_gate(torch.randn(9, 4 * 6), 4).sum(-1), torch.ones(9))


def test_a_prototype_is_the_top_right_singular_vector() -> None:
    """Experts are stacked; PEFT starts all of them from one vector, and so do we."""
    tops, a, b = [], [], []
    for _ in range(3):
        u, v = torch.linalg.qr(torch.randn(20, 4)).Q, torch.linalg.qr(torch.randn(30, 4)).Q
        a.append((torch.tensor([3.0, 1.0, 0.5, 0.1]) * v).T)  # singular values 3, 1, ...
        b.append(u)
        tops.append(v[:, 0])
    found = prototypes(torch.stack(a), torch.stack(b), seed=draw(0, 99))
    torch.testing.assert_close((found * torch.stack(tops)).sum(-1).abs(), torch.ones(3))
