"""What training computes in: chosen by speed or by hand, and in bfloat16 nearly what float32 says."""

import pytest
import torch
from torch import nn

from loramux.adapters.training.batches import Batch
from loramux.adapters.training.compute import Speeds, choose, computing, hold, mark, measure, recommend
from loramux.adapters.training.errors import OptionError
from loramux.adapters.training.frozen import replaced
from loramux.adapters.training.loop import token_losses
from loramux.adapters.training.loracoe import LoraCoeTrainer
from loramux.adapters.training.mixlora import MixLoraTrainer
from loramux.adapters.training.mixture import trainer_for
from tests.sparse_kit import small_base
from tests.unit.adapters.training.test_modules import OPTIONS


@pytest.fixture
def model():
    return small_base().float().eval().requires_grad_(False)


def batch_of(model):
    ids = torch.randint(0, model.config.vocab_size, (2, 9))
    return Batch(ids, ids.roll(-1, 1), ids.numel(), torch.ones_like(ids, dtype=torch.bool))


@pytest.mark.parametrize(
    ("bfloat16", "taken"), [(5e11, torch.bfloat16), (1.4e11, torch.float32), (2e9, torch.float32)]
)
def test_auto_takes_bfloat16_where_it_is_faster_by_half(bfloat16, taken):
    compute = recommend(Speeds(float32=1e11, bfloat16=bfloat16))
    assert compute.dtype == taken
    assert f"{bfloat16 / 1e9:.0f} G multiplications a second in bfloat16, 100 in float32" in compute.why


def test_speeds_are_measured():
    speeds = measure()
    assert 1e7 < min(speeds) <= max(speeds) < 1e15
    assert choose("auto", measured=True).dtype in (torch.float32, torch.bfloat16)


def test_what_is_asked_for_is_taken_and_nothing_else_exists():
    assert (
        choose("bfloat16", measured=True).dtype == choose("bfloat16", measured=False).dtype == torch.bfloat16
    )
    assert choose("float32", measured=True).dtype == torch.float32
    assert choose("auto", measured=False) is None
    with pytest.raises(OptionError, match="auto, float32, bfloat16, got 'float16'"):
        choose("float16", measured=True)


def test_only_matrices_are_narrowed(model):
    assert mark(model) == ""
    embeddings = model.get_input_embeddings().weight.clone()
    hold(model, torch.bfloat16)
    assert mark(model) == " bfloat16"
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            linear = isinstance(module, nn.Linear)
            assert parameter.dtype == (torch.bfloat16 if linear else torch.float32), name
            assert not parameter.requires_grad
    assert torch.equal(model.get_input_embeddings().weight, embeddings)


@pytest.mark.parametrize("name", OPTIONS)
def test_losses_and_gradients_are_nearly_those_of_float32(model, name):
    """And gradients are float32, as what is trained is."""
    trainer = trainer_for(model, OPTIONS[name])
    if isinstance(trainer, LoraCoeTrainer):
        trainer.gate(True)
    found = []
    with replaced(model, trainer.modules):
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        batch = batch_of(model)
        for dtype in (torch.float32, torch.bfloat16):
            hold(model, dtype)
            losses = token_losses(model, batch)
            losses.mean().backward()
            found.append((losses.detach(), {n: p.grad for n, p in parameters.items()}))
            model.zero_grad(set_to_none=True)
    (exact, wanted), (narrow, given) = found
    assert narrow.dtype == torch.float32
    assert not torch.equal(narrow, exact)
    torch.testing.assert_close(narrow.mean(), exact.mean(), rtol=0.005, atol=0)
    for path, gradient in given.items():
        assert gradient.dtype == torch.float32, path
    whole, near = (torch.cat([g.flatten() for g in grads.values()]) for grads in (wanted, given))
    # Of MixLoRA, a token near the boundary may go to another expert in bfloat16.
    least = 0.99 if isinstance(trainer, MixLoraTrainer) else 0.999
    assert torch.cosine_similarity(whole, near, dim=0) > least


def test_float32_computes_as_before(model):
    batch = batch_of(model)
    before = token_losses(model, batch)
    hold(model, torch.float32)
    with computing(model):
        assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(token_losses(model, batch), before)
