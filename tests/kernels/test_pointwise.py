"""Norms, rotary embeddings and gated activations in one call say what float64 says."""

import pytest
import torch
from torch import Tensor

from loramux.kernels.pointwise import forbid_, library, rms_norm, rotate_, swiglu_

pytestmark = pytest.mark.skipif(library() is None, reason="installed without a C++ compiler")


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("shape", [(1, 1, 576), (1, 17, 33), (3, 7), (1, 200, 400), (1, 0, 8)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, weight = 5 * torch.randn(shape), torch.randn(shape[-1])
    wide = x.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    assert close(rms_norm(x, weight, 1e-5), expected)
    across = x.transpose(0, 1) if x.dim() == 3 else x
    assert torch.equal(rms_norm(across, weight, 1e-5), rms_norm(across.contiguous(), weight, 1e-5))


@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 9, 64), (5, 3, 20), (37, 2, 6), (150, 8, 128)])
def test_rotate(tokens: int, heads: int, dim: int) -> None:
    x = torch.randn(tokens, heads, dim)
    cos, sin = torch.randn(2, tokens, dim)
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    expected = x.double() * cos.double()[:, None] + turned * sin.double()[:, None]
    assert rotate_(x, cos, sin) is x
    assert close(x, expected)


@pytest.mark.parametrize(("vocabulary", "words"), [(64, 2), (97, 4), (97, 3), (49_152, 1536), (40, 1)])
def test_forbid(vocabulary: int, words: int) -> None:
    logits = torch.randn(7, vocabulary)
    rows = torch.randperm(7)[:4]
    masks = torch.randint(-(2**31), 2**31, (4, words), dtype=torch.int32)
    masks[0], masks[1, 0] = -1, 0
    bits = (masks.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1
    allowed = torch.zeros(4, max(vocabulary, 32 * words), dtype=torch.bool)
    allowed[:, : 32 * words] = bits.flatten(1) == 1
    expected = logits.clone()
    expected[rows] = logits[rows].masked_fill(~allowed[:, :vocabulary], -torch.inf)
    assert forbid_(logits, masks, rows) is logits
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("shape", [(1, 1, 1536), (3, 7), (1, 100, 1000), (0, 8)])
def test_swiglu(shape: tuple[int, ...]) -> None:
    gate, up = 20 * torch.randn(shape), torch.randn(shape)
    expected = torch.nn.functional.silu(gate.double()) * up.double()
    assert swiglu_(gate, up) is gate
    assert close(gate, expected)


def test_swiglu_of_what_is_far_out() -> None:
    gate = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e30, float("nan"), -200.0])
    found = swiglu_(gate.clone(), torch.ones(9))
    expected = torch.nn.functional.silu(gate)
    torch.testing.assert_close(found[1:], expected[1:], atol=1e-30, rtol=1e-5, equal_nan=True)


def test_swiglu_of_a_token_does_not_depend_on_the_others() -> None:
    """Numbers that fill no vector are computed as those that do."""
    gate, up = 3 * torch.randn(2, 9, 50)
    alone = torch.cat([swiglu_(one.clone(), other) for one, other in zip(gate, up, strict=True)])
    assert torch.equal(swiglu_(gate.clone(), up).flatten(), alone)
