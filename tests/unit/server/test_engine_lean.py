"""A base with fewer calls answers as it did, whatever its family."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from loramux.kernels.pointwise import library
from loramux.server.engine.lean import make_lean

pytestmark = pytest.mark.skipif(library() is None, reason="installed without a C++ compiler")
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "vocab_size": 200, "max_position_embeddings": 128,
}  # fmt: skip
#: Family, what else its config needs, and how many modules can be replaced in two layers.
FAMILIES = {
    "Llama": ({}, 2 * 4 + 1),
    "Mistral": ({}, 2 * 4 + 1),
    "Qwen2": ({}, 2 * 4 + 1),
    "Qwen3": ({"head_dim": 16}, 2 * 6 + 1),
    "Phi3": ({"pad_token_id": 0, "eos_token_id": 1}, 2 * 3 + 1),  # one matrix for gate and up
    "Gemma2": ({"head_dim": 16}, 2 * 5 + 1),  # its activation is another
    "Gemma3Text": ({"head_dim": 16}, 2 * 7 + 1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_stay(family: str) -> None:
    more, replaced = FAMILIES[family]
    name = "Gemma3ForCausalLM" if family == "Gemma3Text" else f"{family}ForCausalLM"
    config = getattr(transformers, f"{family}Config")(**SIZES, **more)
    model: Any = getattr(transformers, name)(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # norms of ones would hide which of them are scaled
        parameter.copy_(parameter + 0.05 * torch.randn_like(parameter))
    ids = torch.randint(0, 200, (1, 23))
    expected = model.double()(ids).logits
    model.float()
    assert make_lean(model) == replaced
    found = model(ids).logits
    assert (found - expected).norm() / expected.norm() < 1e-5
    batch = torch.randint(0, 200, (3, 9))  # a layout that our rotation does not take
    plain: Any = type(model)(config).eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(batch).logits, plain(batch).logits, rtol=1e-4, atol=1e-4)


def test_a_module_that_does_something_else_is_left() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8))
            self.eps = 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * x / x.abs().mean(-1, keepdim=True)

    class OddBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.down_proj(self.gate_proj(x).tanh() * self.up_proj(x))
            return y

    assert make_lean(nn.Sequential(OddRMSNorm(), OddBlock()).requires_grad_(False)) == 0
