"""A frozen base during training: its modules, others in their places, gradients through all of it."""

import pytest
import torch
from torch import nn

from loramux.adapters.training.errors import OptionError
from loramux.adapters.training.expert import ExpertOptions
from loramux.adapters.training.frozen import blocks, check_targets, linears, replaced
from loramux.server.engine.model import load_base
from tests.tiny import tiny_llama


def test_a_base_to_train_on_once_swallowed_the_gradients_of_all_layers_but_the_last(tmp_path):
    """Its layers came in oneDNN's layout, whose product has none: they went missing with a warning."""
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    opened = load_base(tmp_path, quantization="none", device="cpu")
    gradients = []
    for one in (model, opened):
        embedded = one.get_input_embeddings()(torch.arange(12).reshape(2, 6)).detach().requires_grad_()
        one(inputs_embeds=embedded).logits.square().sum().backward()
        gradients.append(embedded.grad)
    torch.testing.assert_close(*gradients)


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
