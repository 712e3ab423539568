"""Packed linear layers say what plain ones say."""

import pytest
import torch
from torch import nn

from loramux.kernels.packed_linear import PackedLinear, can_pack, pack_linears

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)


@pytest.mark.parametrize("tokens", [1, 2, 16, 37, 300])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n_in", "n_out"), [(64, 48), (33, 7), (1, 129), (1024, 96)])
def test_equals_the_plain_layer(tokens: int, bias: bool, n_in: int, n_out: int) -> None:
    plain = nn.Linear(n_in, n_out, bias=bias).requires_grad_(False)
    x = torch.randn(1, tokens, n_in)
    expected = nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double() if bias else None)
    y = PackedLinear(plain)(x)
    assert y.shape == (1, tokens, n_out)
    assert (y.double() - expected).norm() / expected.norm() < 2e-6


def test_a_packed_layer_still_tells_its_shape() -> None:
    packed = PackedLinear(nn.Linear(5, 3).requires_grad_(False))
    assert isinstance(packed, nn.Linear)
    assert (packed.out_features, packed.in_features) == (3, 5)
    assert packed.weight.shape == (3, 5)
    assert packed.weight.dtype == torch.float32


def test_tied_weights_are_packed_neither_once_nor_twice() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 4)
            self.middle = nn.Linear(4, 4)
            self.head = nn.Linear(4, 11, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied().requires_grad_(False)
    assert pack_linears(model) == 1
    assert isinstance(model.middle, PackedLinear)
    assert type(model.head) is nn.Linear
    assert model.head.weight is model.embedding.weight


def test_other_kinds_of_weights_stay_as_they_are() -> None:
    assert not can_pack(torch.empty(2, 2, dtype=torch.bfloat16))
    assert not can_pack(torch.empty(2, 2, device="meta"))
    model = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4)).requires_grad_(False)
    assert pack_linears(model) == 1
    assert type(model[0]) is nn.Linear
