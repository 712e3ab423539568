"""The Triton form of the MixLoRA block against its reference in float64: compiled where there is a CUDA
device, else interpreted."""

import math

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton is published for Linux on x86-64")

from loramux.kernels.mixlora_ffn import (
    Experts,
    Ffn,
    Gated,
    Plain,
    Routes,
    finish,
    mixlora_ffn_reference,
    probabilities,
    switch,
    top_k,
    top_p,
)
from tests.kernels.batches import draw
from tests.kernels.ffn_blocks import KINDS, RandomBlock, Stack, random_block

CUDA = torch.cuda.is_available()
if CUDA:
    from loramux.kernels.mixlora_ffn import triton as form
else:
    with pytest.MonkeyPatch.context() as patch:  # a kernel is interpreted if this is set when it is defined
        patch.setenv("TRITON_INTERPRET", "1")
        from loramux.kernels.mixlora_ffn import triton as form

DEVICE = "cuda" if CUDA else "cpu"
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}

pytestmark = [
    # The interpreter computes in NumPy, which also looks at what a kernel reads and then masks out.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]


def wide(block: RandomBlock) -> tuple[Ffn, dict[str, Stack]]:
    """The same block and experts in float64."""
    linears = {name: layer.to("cpu", torch.float64) for name, layer in block.linears.items()}
    first = {name: linears[name] for name in block.ffn.first}
    last = block.ffn.last[0]
    stacks = {name: Stack(s.a.double(), s.b.double(), s.scale) for name, s in block.stacks.items()}
    return Ffn(first, (last, linears[last]), block.ffn.activate, linears[last].bias), stacks


def run(block: RandomBlock, experts: int, x: Tensor, routes: Routes) -> Tensor:
    """The operator with the form in its place, whatever the device."""
    laid_out = Experts.prepare(experts, block.stacks, block.ffn.last[0], device=DEVICE, dtype=x.dtype)
    for layer in block.linears.values():
        layer.to(DEVICE)
    x = x.to(DEVICE)
    passed = None if routes.passed is None else routes.passed.to(DEVICE)
    routes = Routes(routes.weights.to(DEVICE), routes.chosen.to(DEVICE), passed, routes.sums_to_one)
    assert form.takes(block.ffn, x)
    first = {name: layer(x) for name, layer in block.ffn.first.items()}
    mixed = form.mix(x, first, block.ffn, laid_out, routes)
    return finish(x, block.ffn.last[1](mixed.hidden), mixed, block.ffn, laid_out, routes).cpu()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def check(block: RandomBlock, experts: int, x: Tensor, routes: Routes) -> None:
    found = run(block, experts, x, routes)
    ffn, stacks = wide(block)
    wanted = mixlora_ffn_reference(x.double(), ffn, stacks, routes)
    assert error(found, wanted) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("strategy", ["top-k", "top-p", "switch"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(kind: str, strategy: str, dtype: torch.dtype) -> None:
    experts, tokens = draw(2, 6), draw(1, 40)
    block = random_block(kind, 24, draw(33, 140), experts, dtype=dtype)
    p = probabilities(torch.randn(tokens, experts) * 2)
    routes = {"top-k": top_k(p, 2), "top-p": top_p(p, 0.7), "switch": switch(p, 3, [tokens])}[strategy]
    check(block, experts, torch.randn(tokens, 24).to(dtype), routes)


@pytest.mark.parametrize("tokens", [1, 16, 257])
@pytest.mark.parametrize("ranks", [(1, 1, 1), (16, 16, 16), (3, 64, 20), (70, 8, 129)], ids=str)
def test_every_rank_and_both_lengths_of_a_tile(ranks: tuple[int, int, int], tokens: int) -> None:
    block = random_block("gated", 20, 70, 3, dtype=torch.float32, ranks=ranks)
    check(block, 3, torch.randn(tokens, 20), top_k(probabilities(torch.randn(tokens, 3)), 2))


@pytest.mark.parametrize(
    "leave_out", ["gate_proj", "up_proj", "down_proj", "gate_proj up_proj", "gate_proj up_proj down_proj"]
)
def test_a_projection_without_factors_has_no_delta(leave_out: str) -> None:
    block = random_block("gated", 16, 40, 4, dtype=torch.float32, leave_out=leave_out.split())
    check(block, 4, torch.randn(9, 16), top_k(probabilities(torch.randn(9, 4)), 2))


@pytest.mark.parametrize(
    "activation", [nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.ReLU()], ids=str
)
def test_every_activation(activation: nn.Module) -> None:
    block = random_block("gated", 16, 40, 3, dtype=torch.float32)
    ffn = Ffn(block.ffn.first, block.ffn.last, Gated(activation))
    changed = RandomBlock(ffn, block.linears, block.stacks)
    check(changed, 3, torch.randn(20, 16) * 2, top_k(probabilities(torch.randn(20, 3)), 2))


def test_an_unknown_activation_or_type_is_left_to_the_other_form() -> None:
    block = random_block("plain", 8, 16, 2, dtype=torch.float32)
    ffn = Ffn(block.ffn.first, block.ffn.last, Plain(nn.Tanh()))
    assert not form.takes(ffn, torch.zeros(1, 8))
    assert not form.takes(block.ffn, torch.zeros(1, 8, dtype=torch.float64))


def test_one_tokens_infinities_stay_its_own() -> None:
    block = random_block("gated", 16, 40, 2, dtype=torch.float32)
    x = torch.randn(4, 16)
    p = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.8, 0.2], [0.2, 0.8]])
    alone = run(block, 2, x, switch(p))
    broken = x.clone()
    broken[1] = math.inf
    found = run(block, 2, broken, switch(p))
    assert not torch.isfinite(found[1]).any()
    torch.testing.assert_close(found[[0, 2, 3]], alone[[0, 2, 3]], rtol=0, atol=0)
