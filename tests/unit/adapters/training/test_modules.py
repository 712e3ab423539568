"""MixLoRA, LoRACoE and LoRAMoE while they train: their formulas in float64, and which tensors learn."""

import pytest
import torch
from torch.nn.functional import linear

from loramux.adapters.sparse.model import FfnStrategy
from loramux.adapters.training.errors import OptionError
from loramux.adapters.training.frozen import replaced
from loramux.adapters.training.loracoe import LoraCoeOptions, LoraCoeTrainer
from loramux.adapters.training.loramoe import LoraMoeOptions
from loramux.adapters.training.mixlora import MixLoraOptions
from loramux.adapters.training.mixture import trainer_for
from loramux.kernels.mixlora_ffn import Ffn, Gated, mixlora_ffn_reference, probabilities, switch, top_k
from tests.sparse_kit import small_base
from tests.unit.adapters.training.scripts import scripted

SWITCH = FfnStrategy.SWITCH
OPTIONS = {
    "mixlora": MixLoraOptions(rank=3, alpha=6, experts=4, top_k=2, dropout=0.0, z_weight=0.01),
    "mixlora top 3, no attention": MixLoraOptions(
        rank=2, experts=5, top_k=3, dropout=0.0, targets=("up_proj", "down_proj")
    ),
    "switch": MixLoraOptions(rank=3, alpha=6, experts=4, strategy=SWITCH, dropout=0.0, jitter=0.0),
    "loracoe": LoraCoeOptions(rank=4, alpha=6, experts=3),
    "loracoe, gain 1": LoraCoeOptions(rank=4, experts=2, gate_gain="none"),
    "loramoe": LoraMoeOptions(rank=2, alpha=5, experts=3, balance_weight=0.1),
}


@pytest.fixture
def model():
    return small_base().float().eval().requires_grad_(False)


def stirred(model, options):
    """A trainer whose deltas and routers are far from their start, and choices far from certain: a softmax of
    large numbers makes much of float32's last bits."""
    trainer = trainer_for(model, options)
    with torch.no_grad():
        for module in trainer.modules.values():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    spread = 2 * parameter.shape[-1] ** -0.5 if "router" in name else 0.3
                    parameter.copy_(spread * torch.randn_like(parameter))
    if isinstance(trainer, LoraCoeTrainer):
        trainer.gate(True)
    return trainer


def tokens(model):
    return torch.randint(0, model.config.vocab_size, (2, 7))


@pytest.mark.parametrize("name", OPTIONS)
def test_the_forward_pass_is_the_published_formula(model, name):
    trainer = stirred(model, OPTIONS[name])
    ids = tokens(model)
    expected = scripted(model, trainer.result("m", torch.float32))(ids).logits
    bare = model(ids).logits
    with replaced(model, trainer.modules):
        found = model(ids).logits
    assert (found - bare).abs().max() > 1e-2
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(model(ids).logits, bare)


@pytest.mark.parametrize("architecture", ["phi", "phi3", "gemma2", "qwen3"])
def test_mixlora_knows_the_blocks_of_other_architectures(architecture):
    model = small_base(architecture).float().eval().requires_grad_(False)
    trainer = stirred(model, MixLoraOptions(rank=2, experts=3, dropout=0.0))
    ids = tokens(model)
    expected = scripted(model, trainer.result("m", torch.float32))(ids).logits
    with replaced(model, trainer.modules):
        found = model(ids).logits
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


# Switch scales its output by a probability from the first step on.
@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"switch"}))
def test_a_fresh_model_says_what_the_base_says(model, name):
    trainer = trainer_for(model, OPTIONS[name])
    ids = tokens(model)
    expected = model(ids).logits
    with replaced(model, trainer.modules):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_trainable_tensor_learns_and_no_weight_of_the_base(model, name):
    trainer = stirred(model, OPTIONS[name])
    ids = tokens(model)
    with replaced(model, trainer.modules):
        model.train()
        loss = model(ids).logits.logsumexp(-1).square().mean()
        if not isinstance(trainer, LoraCoeTrainer):
            loss = loss + trainer.penalty(torch.ones(2, 7, dtype=torch.bool))
        loss.backward()
        model.eval()
        learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert learning
        assert [n for n, p in learning.items() if p.grad is None or not p.grad.abs().max() > 0] == []
        assert [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []


def test_routers_of_mixlora_learn_from_the_language_alone(model):
    """Through the renormalised weights; with one expert a token these are constant, and so it is refused."""
    trainer = stirred(model, OPTIONS["mixlora"])
    with replaced(model, trainer.modules):
        model.train()(tokens(model)).logits.logsumexp(-1).square().mean().backward()
        model.eval()
    assert all(block.router.grad.abs().max() > 0 for block in trainer.ffn.values())
    with pytest.raises(OptionError, match="use switch"):
        MixLoraOptions(top_k=1)


def test_the_warm_up_of_loracoe_is_a_plain_lora(model):
    trainer = stirred(model, OPTIONS["loracoe"])
    trainer.gate(False)
    ids = tokens(model)
    result = trainer.result("m", torch.float32)
    assert all(mixture.router is None for mixture in result.linear.values())
    with replaced(model, trainer.modules):
        found = model(ids).logits
        assert not any("router" in n for n, p in model.named_parameters() if p.requires_grad)
    torch.testing.assert_close(found, scripted(model, result)(ids).logits.float(), rtol=1e-4, atol=1e-4)


def test_with_gain_rank_a_fresh_router_keeps_the_warmed_up_delta_and_without_shrinks_it(model):
    path = "model.layers.0.mlp.up_proj"
    x = torch.randn(5, model.get_submodule(path).in_features)
    ratios = {}
    for gain in ("rank", "none", 2.0):
        trainer = trainer_for(model, LoraCoeOptions(rank=8, experts=2, gate_gain=gain))
        module = trainer.linear[path]
        torch.nn.init.normal_(module.factors.bt)
        with torch.no_grad():
            plain = module(x) - module.base(x)
            trainer.gate(True)
            gated = module(x) - module.base(x)
        ratios[gain] = float((gated * plain).sum() / plain.square().sum())
    assert ratios["rank"] == pytest.approx(1.0, abs=0.05)
    assert ratios["none"] == pytest.approx(1 / 8, abs=0.01)
    assert ratios[2.0] == pytest.approx(2 / 8, abs=0.02)


def test_tokens_over_the_capacity_pass_by_scaled_while_training_only(model):
    options = MixLoraOptions(rank=2, experts=3, strategy=SWITCH, capacity=2, dropout=0.0, jitter=0.0)
    block = stirred(model, options).ffn["model.layers.0.mlp"]
    with torch.no_grad():
        block.router.copy_(torch.eye(3, block.router.shape[1]))
        x = torch.randn(2, 5, block.router.shape[1])
        x[..., :3] = torch.tensor([9.0, 0.0, 0.0])
        x[1, 3, :3] = torch.tensor([0.0, 9.0, 0.0])
        whole = block.eval()(x)
        limited = block.train()(x)
    top = linear(x, block.router).softmax(-1).max(-1).values[..., None]
    kept = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 1, 0]], dtype=torch.bool)[..., None]
    torch.testing.assert_close(limited, torch.where(kept, whole, top * x))
    assert not torch.allclose(limited, whole)


def test_noise_and_dropout_are_for_training_only(model):
    options = MixLoraOptions(rank=2, experts=3, strategy=SWITCH, dropout=0.5)
    trainer = stirred(model, options)
    ids = tokens(model)
    with replaced(model, trainer.modules):
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)
        model.eval()


def test_routers_start_as_wide_as_the_strategy_wants(model):
    def spread(**options):
        blocks = trainer_for(model, MixLoraOptions(experts=64, **options)).ffn.values()
        return float(torch.cat([block.router.flatten() for block in blocks]).detach().std())

    assert spread() == pytest.approx(0.02, rel=0.1)
    assert spread(strategy=SWITCH) == pytest.approx(1.0, rel=0.1)
    assert spread(router_init=0.3) == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (lambda: MixLoraOptions(strategy=FfnStrategy.TOP_P), "choose top_k or switch"),
        (lambda: MixLoraOptions(top_k=9), "2 to experts"),
        (lambda: MixLoraOptions(experts=1), "at least 2 experts"),
        (lambda: MixLoraOptions(capacity=0), "capacity"),
        (lambda: LoraMoeOptions(experts=1), "at least 2 experts"),
        (lambda: LoraMoeOptions(balance_weight=-1.0), "balance_weight"),
        (lambda: LoraCoeOptions(gate_gain="r"), "gate_gain"),
        (lambda: LoraCoeOptions(gate_gain=0.0), "gate_gain"),
        (lambda: LoraCoeOptions(warmup=1.0), "warmup"),
        (lambda: LoraCoeOptions(joint_rate=0.0), "joint_rate"),
        (lambda: LoraCoeOptions(experts=0), "experts"),
    ],
)
def test_options_that_cannot_be_met_are_refused(options, reason):
    with pytest.raises(OptionError, match=reason):
        options()


@pytest.mark.parametrize("name", ["mixlora", "switch"])
def test_a_block_in_training_agrees_with_the_operator_that_serves_it(model, name):
    path = "model.layers.1.mlp"
    trainer = stirred(model, OPTIONS[name])
    block, mlp = trainer.ffn[path], model.get_submodule(path)
    served = trainer.result("m", torch.float32).ffn[path]
    x = torch.randn(11, served.router.shape[1])
    p = probabilities(linear(x, served.router))
    routes = switch(p) if name == "switch" else top_k(p, served.routing.top_k)
    first = {"gate_proj": mlp.gate_proj, "up_proj": mlp.up_proj}
    ffn = Ffn(first, ("down_proj", mlp.down_proj), Gated(mlp.act_fn))
    expected = mixlora_ffn_reference(x, ffn, served.projections, routes)
    with torch.no_grad():
        torch.testing.assert_close(block.eval()(x[None])[0], expected, rtol=1e-4, atol=1e-5)
