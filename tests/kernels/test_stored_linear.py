"""Layers over stored weights say what float64 says of the same weights, in every kind and instruction set."""

import pytest
import torch
from torch import Tensor, nn

from loramux.kernels.packed_linear import (
    Instructions,
    Kind,
    Kinds,
    Packed,
    StoredEmbedding,
    StoredLinear,
    instruction_sets,
    library,
    pack,
    store_weights,
    unpack,
)

native = pytest.mark.skipif(library() is None, reason="installed without a C++ compiler")
#: Of a matrix of normal numbers, the error that rounding to the kind makes, relative; generous by a fifth.
ROUNDING = {
    Kind.F32: 1e-9, Kind.BF16: 0.002, Kind.F16: 0.0003, Kind.INT8: 0.01, Kind.Q8_0: 0.007, Kind.Q4_0: 0.1,
    Kind.Q4_1: 0.095,
}  # fmt: skip


def oracle(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ unpack(packed).double().T
    return y if bias is None else y + bias.double()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def summed(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """The sizes of what is added up, of which little may remain."""
    total = x.double().abs() @ unpack(packed).double().abs().T
    return total if bias is None else total + bias.double().abs()


@native
@pytest.mark.parametrize("instructions", instruction_sets())
@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (7, 33), (48, 64), (129, 31), (6, 8 * 32), (37, 9 * 32), (5, 1000)]
)
def test_products_equal_the_oracle(kind: Kind, instructions: Instructions, rows: int, columns: int) -> None:
    packed = pack(torch.randn(rows, columns), kind)
    bias = torch.randn(rows) if rows % 2 else None
    layer = StoredLinear(packed, bias, instructions=instructions)
    for tokens in (1, 2, 3, 5, 6, 7, 16, 33, 70):
        x = torch.randn(1, tokens, columns)
        y = layer(x)
        assert y.shape == (1, tokens, rows)
        assert error(y, oracle(x, packed, bias)) < 2e-6


@native
@pytest.mark.parametrize("instructions", instruction_sets())
@pytest.mark.parametrize("kind", Kind)
def test_a_token_is_told_the_same_whatever_else_is_in_the_batch(
    kind: Kind, instructions: Instructions
) -> None:
    layer = StoredLinear(pack(torch.randn(70, 300), kind), instructions=instructions)
    x = torch.randn(32, 300)
    together = layer(x)
    for tokens in (1, 2, 5, 13):
        assert torch.equal(layer(x[:tokens]), together[:tokens])


@native
@pytest.mark.parametrize("instructions", instruction_sets())
@pytest.mark.parametrize("kind", Kind)
def test_an_invariant_layer_tells_a_prompt_what_it_tells_a_token(
    kind: Kind, instructions: Instructions
) -> None:
    """Where torch would multiply, which adds up in another order."""
    packed = pack(torch.randn(50, 200), kind)
    layer = StoredLinear(packed, torch.randn(50), invariant=True, instructions=instructions)
    x = torch.randn(150, 200)
    together = layer(x)
    assert error(together, oracle(x, packed, layer.bias)) < 2e-6
    usual = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            for tokens in (1, 7, 100):
                assert torch.equal(torch.cat([layer(part) for part in x.split(tokens)]), together)
        finally:
            torch.set_num_threads(usual)


@native
@pytest.mark.parametrize("instructions", instruction_sets())
@pytest.mark.parametrize("kind", Kind)
def test_widening_is_exact(kind: Kind, instructions: Instructions) -> None:
    """Also of what is beyond normal numbers: the smallest halves, and none at all."""
    weight = torch.randn(9, 300) * torch.logspace(-8, 2, 9)[:, None]
    weight[4] = 0
    packed = pack(weight, kind)
    one = torch.eye(300)
    found = StoredLinear(packed, instructions=instructions)(one).T  # each sum has one product that is not 0
    torch.testing.assert_close(found, unpack(packed), rtol=2e-7 if kind is Kind.Q4_1 else 0, atol=0)
    ids = torch.tensor([[8, 0], [4, 4]])
    looked_up = StoredEmbedding(packed)(ids)
    torch.testing.assert_close(looked_up, unpack(packed)[ids], rtol=2e-7 if kind is Kind.Q4_1 else 0, atol=0)


@native
@pytest.mark.parametrize("instructions", instruction_sets())
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1])
def test_blocks_with_any_bytes(kind: Kind, instructions: Instructions) -> None:
    """Blocks are what a file has, not what our own rounding makes: every number, scales of either sign."""
    data = torch.randint(0, 256, (21, 11 * kind.block_bytes), dtype=torch.uint8)
    halves = 2 if kind is Kind.Q4_1 else 1
    scales = torch.randn(21, 11, halves).half().view(torch.uint8)
    data.view(21, 11, -1)[:, :, : 2 * halves] = scales
    packed = Packed.from_blocks(data, kind.name)
    x = torch.randn(4, 11 * 32)
    assert error(StoredLinear(packed, instructions=instructions)(x), oracle(x, packed)) < 2e-6


def test_blocks_lie_as_in_a_gguf_file() -> None:
    half = lambda value: torch.tensor([value]).half().view(torch.uint8)  # noqa: E731
    nibbles = torch.tensor([low | high << 4 for low, high in zip(range(16), range(15, -1, -1), strict=True)])
    numbers = torch.cat([torch.arange(16), torch.arange(15, -1, -1)]).float()
    q4_0 = torch.cat([half(0.5), nibbles.byte()])[None]
    q4_1 = torch.cat([half(0.5), half(-3.0), nibbles.byte()])[None]
    q8_0 = torch.cat([half(0.25), torch.arange(-16, 16).to(torch.int8).view(torch.uint8)])[None]
    assert torch.equal(unpack(Packed.from_blocks(q4_0, "Q4_0"))[0], 0.5 * (numbers - 8))
    assert torch.equal(unpack(Packed.from_blocks(q4_1, "Q4_1"))[0], 0.5 * numbers - 3)
    assert torch.equal(unpack(Packed.from_blocks(q8_0, "Q8_0"))[0], 0.25 * torch.arange(-16, 16))


@pytest.mark.parametrize("kind", Kind)
def test_rounding_is_as_fine_as_the_kind(kind: Kind) -> None:
    weight = torch.randn(64, 320)
    packed = pack(weight, kind)
    assert error(unpack(packed), weight.double()) < ROUNDING[kind]
    scales = 0 if packed.scales is None else packed.scales.nbytes
    assert packed.data.nbytes + scales == kind.nbytes(64, 320)


@pytest.mark.parametrize("kind", Kind)
def test_packing_by_pieces_changes_nothing(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(23, 70)
    whole = unpack(pack(weight, kind))
    monkeypatch.setattr("loramux.kernels.packed_linear.kinds._PIECE", 200)
    assert torch.equal(unpack(pack(weight, kind)), whole)


def test_bfloat16_keeps_its_memory() -> None:
    weight = torch.randn(4, 64).bfloat16()
    assert pack(weight, Kind.BF16).data.data_ptr() == weight.data_ptr()


def test_unknown_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="no kernel for blocks of the kind 'Q6_K'"):
        Packed.from_blocks(torch.zeros(2, 210, dtype=torch.uint8), "Q6_K")
    with pytest.raises(ValueError, match="q4_0 are uint8 in multiples of 18"):
        Packed.from_blocks(torch.zeros(2, 20, dtype=torch.uint8), "Q4_0")


@pytest.mark.parametrize("built", [True, False])
def test_other_types_of_activations(built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not built:
        monkeypatch.setattr("loramux.kernels.packed_linear.stored.library", lambda: None)
    packed = pack(torch.randn(40, 50), Kind.Q8_0)
    layer = StoredLinear(packed, torch.randn(40))
    for tokens in (3, 70):
        x = torch.randn(tokens, 50).bfloat16()
        y = layer(x)
        assert y.dtype == torch.bfloat16
        assert error(y, oracle(x, packed, layer.bias)) < 0.004


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 64)
        self.middle = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.middle(self.embedding(ids))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("built", [True, False])
def test_a_model_in_bfloat16_answers_as_in_float32(built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not built:
        monkeypatch.setattr("loramux.kernels.packed_linear.stored.library", lambda: None)
    model = Tied().bfloat16().requires_grad_(False)
    ids = torch.randint(0, 11, (2, 5))
    plain = Tied().requires_grad_(False)
    plain.load_state_dict(model.state_dict())
    expected = plain.double()(ids)
    assert store_weights(model, Kinds(Kind.BF16, Kind.BF16)) == 3
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert error(model(ids), expected) < 2e-6


def test_tied_weights_are_stored_once_in_the_kind_of_embeddings() -> None:
    model = Tied().requires_grad_(False)
    store_weights(model, Kinds(Kind.Q4_0, Kind.Q8_0))
    assert isinstance(model.head, StoredLinear)
    assert isinstance(model.embedding, StoredEmbedding)
    assert isinstance(model.middle, StoredLinear)
    assert model.head.packed is model.embedding.packed
    assert model.head.packed.kind is Kind.Q8_0
    assert model.middle.packed.kind is Kind.Q4_0


def test_rows_that_are_not_there_are_refused() -> None:
    embedding = StoredEmbedding(pack(torch.randn(5, 32), Kind.INT8), scale=3.0)
    assert torch.equal(embedding(torch.tensor([4])), 3 * unpack(embedding.packed)[4:])
    for bad in (-1, 5):
        with pytest.raises(IndexError, match="an embedding of 5 rows"):
            embedding(torch.tensor([0, bad]))
