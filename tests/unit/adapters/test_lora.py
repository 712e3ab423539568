"""One adapter in memory: stacks and pairs are two views of the same numbers."""

import pytest
import torch

from loramux.adapters.errors import AdapterFormatError
from loramux.adapters.lora import LoraAdapter, LoraPair

SHAPES = {"b": (5, 3), "a": (5, 3), "c": (4, 6)}


def make(dtype: torch.dtype = torch.float32) -> LoraAdapter:
    pairs = {
        module: LoraPair(torch.randn(2, n_in, dtype=dtype), torch.randn(n_out, 2, dtype=dtype), 0.5 + i)
        for i, (module, (n_out, n_in)) in enumerate(SHAPES.items())
    }
    return LoraAdapter("x", "hash", pairs)


def test_stacks_and_pairs_agree() -> None:
    given = make()
    assert [stack.modules for stack in given.stacks] == [("a", "b"), ("c",)]
    assert [stack.shape for stack in given.stacks] == [(5, 3), (4, 6)]
    back = LoraAdapter.from_stacks("y", "hash", given.stacks)
    assert set(back.pairs) == set(SHAPES)
    assert len(back.pairs) == 3
    for module in SHAPES:
        assert torch.equal(back.delta(module), given.delta(module))
        assert back.pairs[module].scale == given.pairs[module].scale
    assert back.ranks == given.ranks == dict.fromkeys(SHAPES, 2)
    assert back.nbytes == given.nbytes == 4 * 2 * (8 + 8 + 10)


def test_pairs_of_stacks_are_views() -> None:
    adapter = LoraAdapter.from_stacks("y", "hash", make().stacks)
    adapter.pairs["a"].a.zero_()
    assert not adapter.delta("a").any()


def test_types() -> None:
    assert make(torch.bfloat16).dtype == torch.bfloat16
    mixed = LoraAdapter("x", "h", {"a": make().pairs["a"], "c": make(torch.bfloat16).pairs["c"]})
    assert mixed.dtype == torch.float32
    assert LoraAdapter("x", "h", {}).dtype == torch.float32
    assert LoraAdapter("x", "h", {}).max_rank == 0


def test_an_unknown_module_is_a_key_error() -> None:
    adapter = LoraAdapter.from_stacks("y", "hash", make().stacks)
    with pytest.raises(KeyError):
        adapter.delta("d")


@pytest.mark.parametrize(
    "pair",
    [
        LoraPair(torch.ones(2, 3), torch.ones(5, 3), 1.0),
        LoraPair(torch.ones(2, 3, 1), torch.ones(5, 2), 1.0),
        LoraPair(torch.ones(2, 3), torch.ones(5, 2, dtype=torch.float16), 1.0),
    ],
    ids=["rank", "dimensions", "types"],
)
def test_factors_that_do_not_fit_are_refused_by_module(pair: LoraPair) -> None:
    with pytest.raises(AdapterFormatError, match=r"layer\.up"):
        LoraAdapter("x", "h", {"layer.up": pair})
