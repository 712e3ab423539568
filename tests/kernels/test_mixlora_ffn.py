"""The MixLoRA block against scripts of its formulas, written token by token in float64."""

import math

import pytest
import torch
from torch import Tensor, nn

from loramux.kernels.mixlora_ffn import (
    Experts,
    Ffn,
    Gated,
    Halves,
    Plain,
    Routes,
    finish,
    mixlora_ffn,
    mixlora_ffn_reference,
    native,
    probabilities,
    switch,
    top_k,
    top_p,
)
from tests.kernels.batches import draw
from tests.kernels.ffn_blocks import KINDS, RandomBlock, Stack, random_block

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
STRATEGIES = ["top-k", "top-p", "switch", "switch with a capacity"]


def route(strategy: str, logits: Tensor, lengths: list[int]) -> Routes:
    p = probabilities(logits)
    if strategy == "top-k":
        return top_k(p, 2)
    if strategy == "top-p":
        return top_p(p, 0.7)
    return switch(p, 3 if strategy.endswith("capacity") else None, lengths)


def by_hand(block: RandomBlock, strategy: str, x: Tensor, logits: Tensor, lengths: list[int]) -> Tensor:
    """Token by token: routing by sorting numbers, each expert's deltas merged into the base's weights."""
    rows = []
    served: dict[int, int] = {}
    starts = {sum(lengths[:i]) for i in range(len(lengths))}
    for t, token in enumerate(x.double()):
        if t in starts:
            served = {}
        exps = [math.exp(value) for value in logits[t].double().tolist()]
        p = [value / sum(exps) for value in exps]
        order = sorted(range(len(p)), key=lambda e: -p[e])
        weights: dict[int, float] = {}
        if strategy == "top-k":
            weights = {e: p[e] / (p[order[0]] + p[order[1]]) for e in order[:2]}
        elif strategy == "top-p":
            total = 0.0
            for e in order:
                weights[e] = p[e]
                total += p[e]
                if total > 0.7:
                    break
        else:
            best = order[0]
            served[best] = served.get(best, 0) + 1
            if strategy.endswith("capacity") and served[best] > 3:
                rows.append(p[best] * token)
                continue
            weights = {best: p[best]}
        rows.append(sum(weight * expert_of(block, e, token) for e, weight in weights.items()))
    return torch.stack([torch.as_tensor(row) for row in rows])


def expert_of(block: RandomBlock, expert: int, token: Tensor) -> Tensor:
    def run(name: str, z: Tensor) -> Tensor:
        linear = block.linears[name]
        weight = linear.weight.double()
        if name in block.stacks:
            stack = block.stacks[name]
            weight = weight + stack.scale * stack.b[expert].double() @ stack.a[expert].double()
        return weight @ z + (0 if linear.bias is None else linear.bias.double())

    def silu(z: Tensor) -> Tensor:
        return z / (1 + torch.exp(-z))

    if "fc1" in block.linears:
        z = run("fc1", token)
        return run("fc2", z * 0.5 * (1 + torch.erf(z / math.sqrt(2))))
    if "gate_up_proj" in block.linears:
        both = run("gate_up_proj", token)
        half = len(both) // 2
        return run("down_proj", silu(both[:half]) * both[half:])
    return run("down_proj", silu(run("gate_proj", token)) * run("up_proj", token))


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[1], [2, 1, 4], [9, 40, 1]], ids=str)
def test_equals_the_formula(kind: str, strategy: str, lengths: list[int], dtype: torch.dtype) -> None:
    tokens, hidden, experts = sum(lengths), 24, draw(3, 6)
    block = random_block(kind, hidden, 40, experts, dtype=dtype)
    x = torch.randn(tokens, hidden).to(dtype)
    logits = (
        torch.randn(tokens, experts, dtype=torch.float64 if dtype == torch.float64 else torch.float32) * 2
    )
    routes = route(strategy, logits, lengths)
    wanted = by_hand(block, strategy, x, logits, lengths)
    laid_out = Experts.prepare(experts, block.stacks, block.ffn.last[0], dtype=dtype)
    assert error(mixlora_ffn(x, block.ffn, laid_out, routes), wanted) < TOLERANCE[dtype]
    assert error(mixlora_ffn_reference(x, block.ffn, block.stacks, routes), wanted) < TOLERANCE[dtype]


@pytest.mark.skipif(native.library() is None, reason="the package was installed without a C++ compiler")
@pytest.mark.parametrize("tokens", [1, 2, 17, 64])
@pytest.mark.parametrize("width", [8, 264, 3000])
@pytest.mark.parametrize(
    "activation", [nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.ReLU()], ids=str
)
def test_the_native_form_equals_the_reference_in_float64(
    activation: nn.Module, width: int, tokens: int
) -> None:
    kind, experts = KINDS[draw(0, 3)], draw(1, 6)
    ranks = [draw(1, 20) for _ in range(3)]
    block = random_block(kind, 20, width, experts, dtype=torch.float32, ranks=ranks)
    how = {"plain": Plain, "halves": Halves}.get(kind, Gated)(activation)
    x, p = torch.randn(tokens, 20) * 2, probabilities(torch.randn(tokens, experts))
    routes = [top_k(p, 2), top_p(p, 0.6), switch(p, draw(0, 3), [tokens])][draw(0, 2)]
    laid_out = Experts.prepare(experts, block.stacks, block.ffn.last[0])
    ffn = Ffn(block.ffn.first, block.ffn.last, how, block.ffn.bias)
    first = {name: projection(x) for name, projection in ffn.first.items()}
    assert native.takes(x, first, ffn, laid_out)
    found = mixlora_ffn(x, ffn, laid_out, routes)
    for layer in block.linears.values():
        layer.double()
    stacks = {name: Stack(s.a.double(), s.b.double(), s.scale) for name, s in block.stacks.items()}
    linears = block.linears[block.ffn.last[0]]
    wide = Ffn(ffn.first, ffn.last, how, linears.bias)
    wanted = mixlora_ffn_reference(x.double(), wide, stacks, routes)
    assert error(found, wanted) < TOLERANCE[torch.float32]


@pytest.mark.skipif(native.library() is None, reason="the package was installed without a C++ compiler")
def test_what_a_token_gets_depends_neither_on_the_others_nor_on_the_threads() -> None:
    """Bit by bit, where the base's own products do not depend on them; also beyond what one call takes."""
    block = random_block("gated", 16, 1000, 4, dtype=torch.float32)
    laid_out = Experts.prepare(4, block.stacks, "down_proj")
    x, routes = torch.randn(300, 16), top_k(probabilities(torch.randn(300, 4)), 2)
    first = {name: projection(x) for name, projection in block.ffn.first.items()}
    y = torch.randn(300, 16)

    def mix(tokens: slice) -> tuple[Tensor, Tensor, Tensor]:
        parts = {name: part[tokens] for name, part in first.items()}
        mixed = native.mix(x[tokens], parts, block.ffn, laid_out, routes[tokens])
        assert mixed.low is not None
        last = finish(x[tokens], y[tokens].clone(), mixed, block.ffn, laid_out, routes[tokens])
        return mixed.hidden, mixed.low, last

    whole = mix(slice(0, 300))
    usual = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            for start, stop in ((0, 1), (3, 5), (7, 40), (100, 300)):
                for found, wanted in zip(mix(slice(start, stop)), whole, strict=True):
                    assert torch.equal(found, wanted[start:stop])
        finally:
            torch.set_num_threads(usual)


def test_one_tokens_infinities_stay_its_own() -> None:
    block = random_block("gated", 16, 40, 2, dtype=torch.float32)
    laid_out = Experts.prepare(2, block.stacks, "down_proj")
    routes = switch(torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.8, 0.2], [0.2, 0.8]]))
    x = torch.randn(4, 16)
    alone = mixlora_ffn(x, block.ffn, laid_out, routes)
    x[1] = math.inf
    found = mixlora_ffn(x, block.ffn, laid_out, routes)
    assert not torch.isfinite(found[1]).any()
    torch.testing.assert_close(found[[0, 2, 3]], alone[[0, 2, 3]])


@pytest.mark.parametrize("tokens", [3, 60])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "leave_out", ["gate_proj", "down_proj", "gate_proj up_proj", "gate_proj up_proj down_proj"]
)
def test_a_projection_without_factors_has_no_delta(leave_out: str, dtype: torch.dtype, tokens: int) -> None:
    block = random_block("gated", 16, 24, 4, dtype=dtype, leave_out=leave_out.split())
    x, logits = torch.randn(tokens, 16, dtype=dtype), torch.randn(tokens, 4, dtype=dtype)
    laid_out = Experts.prepare(4, block.stacks, "down_proj", dtype=dtype)
    found = mixlora_ffn(x, block.ffn, laid_out, top_k(probabilities(logits), 2))
    assert error(found, by_hand(block, "top-k", x, logits, [tokens])) < TOLERANCE[dtype]


def test_long_inputs_are_worked_on_in_pieces_that_change_nothing() -> None:
    block = random_block("gated", 12, 20, 5, dtype=torch.float64)
    x = torch.randn(401, 12).double()
    routes = switch(probabilities(torch.randn(401, 5).double()), 20, [300, 101])
    laid_out = Experts.prepare(5, block.stacks, "down_proj", dtype=torch.float64)
    wanted = mixlora_ffn_reference(x, block.ffn, block.stacks, routes)
    assert error(mixlora_ffn(x, block.ffn, laid_out, routes), wanted) < 1e-12


def test_no_tokens_and_all_dropped_tokens() -> None:
    block = random_block("plain", 8, 16, 2, dtype=torch.float64)
    laid_out = Experts.prepare(2, block.stacks, "fc2", dtype=torch.float64)
    empty = top_k(probabilities(torch.randn(0, 2).double()), 2)
    assert mixlora_ffn(torch.zeros(0, 8).double(), block.ffn, laid_out, empty).shape == (0, 8)
    x, p = torch.randn(50, 8).double(), probabilities(torch.randn(50, 2).double())
    found = mixlora_ffn(x, block.ffn, laid_out, switch(p, 0))
    torch.testing.assert_close(found, p.max(-1).values[:, None] * x)


def test_every_base_projection_runs_once_a_token() -> None:
    block = random_block("gated", 16, 24, 8, dtype=torch.float32)
    seen = dict.fromkeys(block.linears, 0)
    for name, linear in block.linears.items():

        def count(_module: object, given: tuple[Tensor], _out: object, name: str = name) -> None:
            seen[name] += len(given[0])

        linear.register_forward_hook(count)
    laid_out = Experts.prepare(8, block.stacks, "down_proj")
    x = torch.randn(300, 16)
    mixlora_ffn(x, block.ffn, laid_out, top_k(probabilities(torch.randn(300, 8)), 4))
    assert seen == {"gate_proj": 300, "up_proj": 300, "down_proj": 300}


def test_top_p_divides_probabilities_by_the_temperature_and_keeps_all_below_the_limit() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]]).double()
    assert top_p(p, 0.7).chosen.tolist() == [[True, True, False]]
    assert top_p(p, 0.8).chosen.sum() >= 2
    warm = top_p(p, 0.9, temperature=0.5)
    torch.testing.assert_close(warm.weights, torch.tensor([[1.0, 0.0, 0.0]]).double())
    cold = top_p(p, 0.9, temperature=2.0)
    torch.testing.assert_close(cold.weights, p / 2)


def test_experts_that_do_not_match_their_router_are_refused() -> None:
    block = random_block("gated", 8, 8, 3, dtype=torch.float32)
    with pytest.raises(ValueError, match="gate_proj has factors of 3 experts, the router has 4"):
        Experts.prepare(4, block.stacks, "down_proj")
