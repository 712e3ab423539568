"""Sparse models applied by the adapter layers, against scripts of their formulas in float64."""

import copy
import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from loramux.adapters.arena import Arena
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import BaseMismatchError
from loramux.adapters.layers import AdapterLayers, GatedLinear
from loramux.adapters.sparse.ffn_layer import FeedForwardLayer
from loramux.adapters.sparse.model import FfnRouting, FfnStrategy, RankMixture, SparseModel
from loramux.adapters.sparse.slot import SparseSlot, place
from loramux.kernels.gated_lora import GateSlot, Slot, plan_step
from loramux.kernels.packed_linear import PackedLinear, pack_linears
from tests.tiny import random_adapter, with_delta
from tests.unit.adapters.sparse.random_models import BASES, loracoe, loramoe, mixlora, tiny_base
from tests.unit.adapters.sparse.scripts import scripted

TOLERANCE = 2e-5
TOP_P = FfnRouting(FfnStrategy.TOP_P, top_p=0.7)
SWITCH = FfnRouting(FfnStrategy.SWITCH)


class Served:
    """A base with adapter layers over a copy of it."""

    def __init__(self, base: PreTrainedModel, *, packed: bool = False) -> None:
        self.base = base
        self.shapes = BaseShapes.from_model(base, "tiny")
        self.model = copy.deepcopy(base)
        if packed:
            pack_linears(self.model)
        self.arena = Arena(self.shapes, 64)
        self.layers = AdapterLayers(self.model, self.arena)

    def logits(self, ids: Tensor, slots: Sequence[Slot | None]) -> Tensor:
        """One forward pass; row i of the ids uses slot i."""
        plan = plan_step([(slot, ids.shape[1]) for slot in slots])
        with torch.inference_mode(), self.layers.running(plan):
            found: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return found

    def expert(self, name: str, weight: float = 1.0) -> tuple[GateSlot, PreTrainedModel]:
        """A resident expert with a weight, and a base with its deltas in the weights."""
        adapter = random_adapter(self.shapes, 4, name)
        extents = self.arena.allocate(4)
        self.arena.write(adapter, extents)
        gate = torch.full((4,), weight)
        return GateSlot(extents, gate, frozenset(adapter.pairs)), with_delta(self.base, [(adapter, weight)])


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(3, 120, (rows, length))


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def wanted(base: PreTrainedModel, sparse: SparseModel, prompt: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = scripted(base, sparse)(input_ids=prompt, use_cache=False).logits
    return found


@pytest.mark.parametrize("length", [2, 20])
@pytest.mark.parametrize("kind", BASES)
def test_mixlora_equals_its_script(kind: str, length: int) -> None:
    served = Served(tiny_base(kind))
    for routing in (FfnRouting(FfnStrategy.TOP_K, top_k=2), TOP_P, SWITCH):
        sparse = mixlora(served.shapes, routing)
        prompt = ids(2, length)
        slot = place(sparse)
        found = served.logits(prompt, [slot, slot])
        assert error(found, wanted(served.base, sparse, prompt)) < TOLERANCE, routing.strategy


@pytest.mark.parametrize("kind", ["llama", "phi", "phi3"])
@pytest.mark.parametrize("method", ["loracoe", "loramoe", "mola"])
def test_linear_mixtures_equal_their_scripts(method: str, kind: str) -> None:
    served = Served(tiny_base(kind))
    coe = method == "loracoe"
    sparse = loracoe(served.shapes) if coe else loramoe(served.shapes, 2 if method == "mola" else None)
    prompt = ids(1, 7)
    assert error(served.logits(prompt, [place(sparse)]), wanted(served.base, sparse, prompt)) < TOLERANCE


@pytest.mark.parametrize("kind", ["llama", "phi", "phi3"])
@pytest.mark.parametrize("length", [1, 3, 20])
def test_one_batch_equals_isolated_passes_and_their_scripts(kind: str, length: int) -> None:
    served = Served(tiny_base(kind))
    first, _ = served.expert("first")
    second, second_model = served.expert("second", 0.6)
    blend = GateSlot(
        first.extents + second.extents, torch.cat([first.gate * 0.3, second.gate]), first.modules
    )
    models = [mixlora(served.shapes), loracoe(served.shapes), mixlora(served.shapes, SWITCH, experts=3)]
    mix, coe, other = (place(model) for model in models)
    slots: list[Slot | None] = [blend, mix, second, coe, None, mix, other, None, mix]
    prompt = ids(len(slots), length)
    together = served.logits(prompt, slots)
    for row, slot in enumerate(slots):
        alone = served.logits(prompt[row : row + 1], [slot])
        assert error(together[row], alone[0]) < TOLERANCE, row
    assert error(together[1:2], wanted(served.base, models[0], prompt[1:2])) < TOLERANCE
    assert error(together[3:4], wanted(served.base, models[1], prompt[3:4])) < TOLERANCE
    assert error(together[6:7], wanted(served.base, models[2], prompt[6:7])) < TOLERANCE
    with torch.inference_mode():
        assert error(together[2:3], second_model(input_ids=prompt[2:3]).logits) < TOLERANCE
        assert error(together[4:5], served.base(input_ids=prompt[4:5]).logits) < TOLERANCE


def test_two_mixlora_models_and_nothing_else_share_a_batch() -> None:
    served = Served(tiny_base("llama"))
    models = [mixlora(served.shapes, attention=False), mixlora(served.shapes, TOP_P, attention=False)]
    one, two = (place(model) for model in models)
    prompt = ids(4, 6)
    found = served.logits(prompt, [one, two, one, two])
    for row, model in enumerate([*models, *models]):
        assert error(found[row : row + 1], wanted(served.base, model, prompt[row : row + 1])) < TOLERANCE


def test_after_a_mixlora_batch_the_bare_base_says_what_it_said_before() -> None:
    served = Served(tiny_base("llama"))
    prompt = ids(2, 5)
    before = served.logits(prompt, [None, None])
    served.logits(prompt, [place(mixlora(served.shapes)), None])
    assert torch.equal(served.logits(prompt, [None, None]), before)


@pytest.mark.parametrize("length", [1, 20])
def test_base_layers_may_be_packed(length: int) -> None:
    served = Served(tiny_base("llama"), packed=True)
    if not isinstance(served.model.model.layers[0].mlp.up_proj, PackedLinear):
        pytest.skip("torch was built without oneDNN: nothing can be packed")
    sparse = mixlora(served.shapes)
    prompt = ids(3, length)
    found = served.logits(prompt, [place(sparse), None, place(sparse)])
    assert error(found[:1], wanted(served.base, sparse, prompt[:1])) < TOLERANCE
    with torch.inference_mode():
        assert error(found[1:2], served.base(input_ids=prompt[1:2]).logits) < TOLERANCE


def test_a_step_without_adapters_runs_on_the_bases_own_modules() -> None:
    served = Served(tiny_base("llama"))
    own = {path: type(module) for path, module in served.model.named_modules()}
    prompt = ids(1, 5)
    bare = served.logits(prompt, [None])
    slot = place(mixlora(served.shapes))
    assert {path: type(module) for path, module in served.model.named_modules()} == own
    with served.layers.running(plan_step([(slot, 5)])):
        types = {type(module) for module in served.model.modules()}
        assert {GatedLinear, FeedForwardLayer} <= types
    assert {path: type(module) for path, module in served.model.named_modules()} == own
    torch.testing.assert_close(served.logits(prompt, [None]), bare, rtol=0, atol=0)


def test_the_experts_may_have_been_trained_with_another_activation_than_the_base_has() -> None:
    served = Served(tiny_base("llama"))
    sparse = mixlora(served.shapes)
    blocks = {path: dataclasses.replace(block, activation="gelu") for path, block in sparse.ffn.items()}
    sparse = dataclasses.replace(sparse, ffn=blocks)
    prompt = ids(2, 7)
    found = served.logits(prompt, [place(sparse), None])
    other = copy.deepcopy(served.base)
    for layer in other.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    assert error(found[:1], wanted(other, sparse, prompt[:1])) < TOLERANCE
    with torch.inference_mode():
        assert error(found[1:], served.base(input_ids=prompt[1:]).logits) < TOLERANCE


def test_capacity_is_counted_in_every_request_on_its_own() -> None:
    served = Served(tiny_base("llama"))
    prompt = ids(3, 12)
    free = mixlora(served.shapes, SWITCH, experts=2)
    blocks = {
        path: dataclasses.replace(block, routing=FfnRouting(FfnStrategy.SWITCH, capacity=3))
        for path, block in free.ffn.items()
    }
    tight = place(dataclasses.replace(free, ffn=blocks))
    together = served.logits(prompt, [tight, None, tight])
    for row in (0, 2):
        assert error(together[row], served.logits(prompt[row : row + 1], [tight])[0]) < TOLERANCE
    unlimited = served.logits(prompt, [place(free)] * 3)
    assert error(together[0, :3], unlimited[0, :3]) < TOLERANCE  # too few tokens to drop one
    assert error(together[0, 7:], unlimited[0, 7:]) > 1e-3  # seven tokens, two experts, three places each


@pytest.mark.parametrize(("bypass", "share"), [(1 / 6, 1 / 6), (1.0, 1.0)], ids=["uniform", "ones"])
def test_loracoe_without_a_router_uses_its_bypass(bypass: float, share: float) -> None:
    served = Served(tiny_base("llama"))
    with_router = loracoe(served.shapes, rank=6)
    assert all(isinstance(mixture, RankMixture) for mixture in with_router.linear.values())
    linear = {
        path: dataclasses.replace(mixture, router=None, gain=1.0, bypass=bypass)
        for path, mixture in with_router.linear.items()
    }
    sparse = dataclasses.replace(with_router, linear=linear)
    prompt = ids(1, 9)
    found = served.logits(prompt, [place(sparse)])
    assert error(found, wanted(served.base, sparse, prompt)) < TOLERANCE
    pairs = {path: (m.a, m.b, m.scale * share) for path, m in linear.items() if isinstance(m, RankMixture)}
    merged = copy.deepcopy(served.base)
    for path, (a, b, scale) in pairs.items():
        merged.get_submodule(path).weight.data += scale * b @ a
    with torch.inference_mode():
        assert error(found, merged(input_ids=prompt).logits) < TOLERANCE


def test_bfloat16_factors_stay_close_to_the_script() -> None:
    served = Served(tiny_base("llama"))
    for sparse in (mixlora(served.shapes), loracoe(served.shapes), loramoe(served.shapes)):
        prompt = ids(1, 9)
        slot = place(sparse, dtype=torch.bfloat16)
        served.model.bfloat16()
        found = served.logits(prompt, [slot])
        served.model.float()
        assert found.dtype == torch.bfloat16
        assert error(found, wanted(served.base, sparse, prompt)) < 0.3  # of all of a model in bfloat16


def test_the_load_counts_tokens_and_entropy() -> None:
    served = Served(tiny_base("llama"))
    sparse = mixlora(served.shapes, experts=4)
    for block in sparse.ffn.values():
        block.router.zero_()
    slot = place(sparse)
    assert slot.load() == ((0, 0, 0, 0), 0.0)
    served.logits(ids(2, 10), [slot, None])
    tokens, entropy = slot.load()
    assert sum(tokens) == 2 * 10 * 2  # layers, tokens, experts of a token
    assert entropy == pytest.approx(math.log(4))
    mola = place(loramoe(served.shapes, 1))
    served.logits(ids(1, 10), [mola])
    assert sum(mola.load().tokens) == 4 * 10
    coe = place(loracoe(served.shapes, rank=6))
    served.logits(ids(1, 10), [coe])
    assert len(coe.load().tokens) == 6
    assert 0 < coe.load().mean_entropy < math.log(6)


def test_a_slot_knows_its_bytes_and_gives_them_back() -> None:
    shapes = BaseShapes.from_model(tiny_base("llama"), "tiny")
    slot = place(loracoe(shapes, experts=2, rank=6))
    assert slot.nbytes == 4 * sum(6 * (n_out + 3 * n_in) for n_out, n_in in shapes.modules.values())
    assert place(mixlora(shapes)).nbytes > 0
    slot.release()
    assert (slot.nbytes, len(slot.modules)) == (0, 0)


def test_a_model_for_another_base_is_refused_and_changes_nothing() -> None:
    llama, phi = Served(tiny_base("llama")), Served(tiny_base("phi"))
    before = [name for name, _ in phi.model.named_modules()]
    mix, coe = mixlora(llama.shapes, attention=False), loracoe(llama.shapes)
    lost = dataclasses.replace(mix, ffn={"model.layers.7.mlp": next(iter(mix.ffn.values()))})
    with pytest.raises(
        BaseMismatchError, match=r"mlp: the base's block has no down_proj, it has \['fc1', 'f"
    ):
        phi.layers.prepare(place(mix))
    with pytest.raises(BaseMismatchError, match=r"no adaptable module 'model.layers.0.mlp.down_proj'"):
        phi.layers.prepare(place(coe))
    with pytest.raises(BaseMismatchError, match=r"no module 'model.layers.7.mlp'"):
        llama.layers.prepare(place(lost))
    assert [name for name, _ in phi.model.named_modules()] == before


def test_a_plan_prepares_what_its_slots_need() -> None:
    served = Served(tiny_base("llama"))
    slot = place(mixlora(served.shapes))
    assert isinstance(slot, SparseSlot)
    with served.layers.running(plan_step([(slot, 2)])):
        assert isinstance(served.model.model.layers[0].mlp, FeedForwardLayer)
