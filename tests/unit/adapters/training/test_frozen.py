"""A frozen base during training: its modules, others in their places, gradients through all of it."""

import pytest
import torch
from torch import nn

from loramux.adapters.training.errors import OptionError
from loramux.adapters.training.expert import ExpertOptions
from loramux.adapters.training.frozen import blocks, check_targets, linears, replaced, unpack_linears
from loramux.kernels.packed_linear import PackedLinear, pack_linears
from tests.tiny import tiny_llama


def test_packed_layers_once_swallowed_the_gradients_of_all_layers_below_them():
    model = tiny_llama()
    packed = tiny_llama()
    packed.load_state_dict(model.state_dict())
    assert pack_linears(packed) > 0
    assert unpack_linears(packed) > 0
    assert unpack_linears(packed) == 0
    gradients = []
    for one in (model, packed):
        ids = torch.arange(12).reshape(2, 6)
        embedded = one.get_input_embeddings()(ids).detach().requires_grad_()
        one(inputs_embeds=embedded).logits.square().sum().backward()
        gradients.append(embedded.grad)
    assert not any(isinstance(module, PackedLinear) for module in packed.modules())
    torch.testing.assert_close(*gradients)
    assert not any(parameter.requires_grad for parameter in packed.parameters())


def test_blocks_and_linears_are_found_in_the_order_of_the_layers():
    model = tiny_llama()
    assert list(blocks(model, "mlp")) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert list(linears(model, "self_attn", ("v_proj", "q_proj"))) == [
        f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")
    ]
    assert len(linears(model, "mlp", None)) == 6


def test_targets_that_are_not_there_are_named():
    model = tiny_llama()
    check_targets(model, ("q_proj", "up_proj"), ("self_attn", "mlp"))
    with pytest.raises(OptionError, match="no module called q_proj, w9; it has down_proj, gate_proj"):
        check_targets(model, ("up_proj", "w9", "q_proj"), ("mlp",))
    with pytest.raises(OptionError, match="Linear has no linear modules"):
        check_targets(nn.Linear(2, 2), None, ("mlp",))


def test_replaced_modules_come_back_even_after_an_error():
    model = tiny_llama()
    before = dict(model.named_modules())
    path = "model.layers.1.mlp"
    stand_in = nn.Linear(64, 64)

    def use_and_fail():
        with replaced(model, {path: stand_in}):
            assert model.get_submodule(path) is stand_in
            assert not stand_in.training
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use_and_fail()
    assert dict(model.named_modules()) == before


def test_impossible_options_are_refused():
    with pytest.raises(OptionError, match="at least one target"):
        ExpertOptions(targets=())
    with pytest.raises(OptionError, match="at least one target"):
        ExpertOptions(targets=None)
    with pytest.raises(OptionError, match="dropout"):
        ExpertOptions(dropout=1.0)
    with pytest.raises(OptionError, match="steps"):
        ExpertOptions(steps=0)
