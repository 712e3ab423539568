"""The methods that merge A's and B's apart: PEFT's numbers on plain LoRA, our rules where PEFT has none."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux.adapters.errors import BlendError
from loramux.adapters.lora import LoraAdapter, LoraPair
from loramux.adapters.merge import merge
from loramux.adapters.peft_format import read_lora
from tests.peft_kit import BASE, distance, peft_merge, save_peft, small_adapter, weighted_sum

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

METHODS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")


@pytest.mark.parametrize("weights", [(0.6, 0.3, 0.1), (1.4, -0.8, 0.5)], ids=["positive", "with a negative"])
@pytest.mark.parametrize(
    ("method", "density"), [("linear", None), ("ties", 0.4), ("ties", 0.77), ("magnitude_prune", 0.3)]
)
def test_peft_agrees(tmp_path: Path, method: str, density: float | None, weights: tuple[float, ...]) -> None:
    fields: list[dict[str, Any]] = [
        {"lora_alpha": 8},
        {"lora_alpha": 3},
        {"lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]},
    ]
    chosen = dict(zip("abc", weights, strict=True))
    for name, extra in zip("abc", fields, strict=True):
        save_peft(tmp_path / name, r=4, **extra)
    parts = [(read_lora(tmp_path / name, id=name, base=BASE), weight) for name, weight in chosen.items()]
    options = {} if density is None else {"density": density}
    judged = peft_merge({name: tmp_path / name for name in chosen}, chosen, method, **options)
    assert distance(merge(parts, method, density=density).adapter, judged) < 1e-6


@pytest.mark.parametrize(("dare", "plain"), [("dare_linear", "linear"), ("dare_ties", "ties")])
def test_dare_that_drops_nothing_is_the_plain_method(dare: str, plain: str) -> None:
    parts = [(small_adapter("a"), 0.6), (small_adapter("b"), -0.3)]
    one, other = merge(parts, dare, density=1.0), merge(parts, plain, density=1.0)
    assert all(torch.equal(one.adapter.delta(m), other.adapter.delta(m)) for m in BASE.modules)


def test_dare_masks_depend_on_seed_content_and_module_only() -> None:
    a, b, c = small_adapter("a"), small_adapter("b"), small_adapter("c", modules=list(BASE.modules)[:5])
    first = merge([(a, 0.6), (b, 0.3)], "dare_linear", density=0.5, seed=7).adapter
    again = merge([(a, 0.6), (b, 0.3)], "dare_linear", density=0.5, seed=7).adapter
    swapped = merge([(b, 0.3), (a, 0.6)], "dare_linear", density=0.5, seed=7).adapter
    other = merge([(a, 0.6), (b, 0.3)], "dare_linear", density=0.5, seed=8).adapter
    beside = merge([(a, 0.6), (b, 0.3), (c, 1.0)], "dare_linear", density=0.5, seed=7).adapter
    last = list(BASE.modules)[-1]
    assert all(torch.equal(first.delta(m), again.delta(m)) for m in BASE.modules)
    assert all(torch.allclose(first.delta(m), swapped.delta(m), atol=1e-5) for m in BASE.modules)
    assert torch.equal(first.delta(last), beside.delta(last))
    assert not torch.allclose(first.delta(last), other.delta(last))


def test_dare_keeps_the_asked_for_share_and_the_mean() -> None:
    """Every entry is 0 or itself over density, so the mean over seeds is `linear`."""
    shape = {"m": (200, 300)}
    pair = LoraPair(torch.rand(8, 300) + 1, torch.rand(200, 8) + 1, 1.0)
    a = LoraAdapter("a", "a", dict.fromkeys(shape, pair))
    zero = LoraAdapter("z", "z", {"m": LoraPair(pair.a * 0, pair.b * 0, 1.0)})
    merged = merge([(a, 1.0), (zero, 1.0)], "dare_linear", density=0.3).adapter.pairs["m"]
    for found, whole in ((merged.a, pair.a), (merged.b, pair.b)):
        kept = found != 0
        assert 0.25 < float(kept.float().mean()) < 0.35
        assert torch.allclose(found[kept], (whole / 0.3)[kept])
    sums = [
        merge([(a, 1.0), (zero, 1.0)], "dare_linear", density=0.3, seed=seed).adapter.pairs["m"].a
        for seed in range(40)
    ]
    assert float((sum(sums) / 40 - pair.a).mean().abs()) < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_the_reported_error_is_the_dense_one(method: str) -> None:
    parts = [
        (small_adapter("a"), 0.6),
        (small_adapter("b"), -0.3),
        (small_adapter("c", modules=list(BASE.modules)[::3]), 0.2),
    ]
    merged = merge(parts, method, density=0.5)
    wanted = weighted_sum([({m: part.delta(m) for m in part.pairs}, weight) for part, weight in parts])
    assert merged.relative_error == pytest.approx(distance(merged.adapter, wanted), rel=1e-5)
    assert merged.relative_error > 0.1


def test_linear_without_cross_terms_is_exact_and_says_so() -> None:
    """Factors with disjoint rank rows have no cross terms: the measure must then come out near zero."""
    a, b = small_adapter("a"), small_adapter("b")
    top, bottom = torch.tensor([1.0, 1, 0, 0]), torch.tensor([0.0, 0, 1, 1])
    apart = [
        LoraAdapter(
            x.id, x.id, {m: LoraPair(p.a * mask[:, None], p.b * mask, p.scale) for m, p in x.pairs.items()}
        )
        for x, mask in ((a, top), (b, bottom))
    ]
    assert merge([(apart[0], 0.5), (apart[1], -0.7)], "linear").relative_error < 2e-7


def test_the_error_against_a_sum_of_zero_is_infinite() -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [3.0]])
    parts = [
        (LoraAdapter("a", "a", {"m": LoraPair(a, b, 1.0)}), 1.0),
        (LoraAdapter("b", "b", {"m": LoraPair(2 * a, -b / 2, 1.0)}), 1.0),
    ]
    assert merge(parts, "linear").relative_error == math.inf
    assert merge(parts, "exact").relative_error == 0.0


def test_ties_elects_signs_and_averages_those_that_agree() -> None:
    a = LoraPair(torch.tensor([[4.0, -4.0, 2.0]]), torch.ones(1, 1), 1.0)
    b = LoraPair(torch.tensor([[2.0, 6.0, -2.0]]), torch.ones(1, 1), 1.0)
    parts = [(LoraAdapter("a", "a", {"m": a}), 1.0), (LoraAdapter("b", "b", {"m": b}), 1.0)]
    merged = merge(parts, "ties", density=1.0).adapter.pairs["m"]
    assert merged.a.tolist() == [[3.0, 6.0, 2.0]]
    assert merged.b.tolist() == [[1.0]]


def test_pruning_keeps_entries_that_tie() -> None:
    a = LoraPair(torch.tensor([[1.0, -1.0, 1.0, 0.5]]), torch.ones(2, 1), 1.0)
    parts = [(LoraAdapter("a", "a", {"m": a}), 1.0)] * 2
    merged = merge(parts, "magnitude_prune", density=0.5).adapter.pairs["m"]
    assert merged.a.tolist() == [[2.0, -2.0, 2.0, 0.0]]


def test_a_density_that_keeps_no_entry_gives_zero() -> None:
    a = small_adapter("a", rank=1)
    merged = merge([(a, 1.0), (small_adapter("b", rank=1), 1.0)], "magnitude_prune", density=0.01)
    assert not merged.adapter.delta(next(iter(BASE.modules))).any()
    assert merged.relative_error == pytest.approx(1.0)


@pytest.mark.parametrize("method", METHODS)
def test_mixed_ranks_are_refused_by_module(method: str) -> None:
    parts = [(small_adapter("a", 4), 0.5), (small_adapter("b", 3), 0.5)]
    with pytest.raises(
        BlendError, match=r"proj: adapters of different rank \(a: 4, b: 3\).*'exact' or 'svd'"
    ):
        merge(parts, method)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_computed_in_float32(method: str) -> None:
    half, full = [], []
    for name, weight in (("a", 0.6), ("b", 0.3)):
        pairs = {
            m: LoraPair(p.a.bfloat16(), p.b.bfloat16(), p.scale) for m, p in small_adapter(name).pairs.items()
        }
        wide = {m: LoraPair(p.a.float(), p.b.float(), p.scale) for m, p in pairs.items()}
        half.append((LoraAdapter(name, name, pairs), weight))
        full.append((LoraAdapter(name, name, wide), weight))
    narrow, wide_result = merge(half, method), merge(full, method)
    assert narrow.adapter.dtype == torch.bfloat16
    for module, pair in wide_result.adapter.pairs.items():
        assert torch.equal(narrow.adapter.pairs[module].a, pair.a.bfloat16())
        assert torch.equal(narrow.adapter.pairs[module].b, pair.b.bfloat16())


def test_compute_dtype_can_be_float64() -> None:
    parts = [(small_adapter("a"), 0.6), (small_adapter("b"), 0.3)]
    for method in METHODS:
        one = merge(parts, method, compute_dtype=torch.float64).adapter
        other = merge(parts, method).adapter
        assert all(torch.allclose(one.delta(m), other.delta(m), atol=1e-5) for m in BASE.modules)
