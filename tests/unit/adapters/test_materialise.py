"""Blends as one plain adapter of an allowed rank."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from loramux.adapters.blend import Blend
from loramux.adapters.errors import BlendError
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.materialise import TooWide, materialise
from loramux.adapters.merge import merge
from loramux.adapters.peft_format import write_lora
from tests.peft_kit import BASE, small_adapter, small_llama

RANKS = (1, 8, 16, 32)
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def blend_of(parts: list[tuple[LoraAdapter, float]], method: str = "exact", rank: int | None = None) -> Blend:
    named = [(adapter.id, adapter.content_hash, weight) for adapter, weight in parts]
    return Blend.of(named, method=method, rank=rank, grid=1e-6)


def halved(adapter: LoraAdapter) -> LoraAdapter:
    """Its factors in bfloat16."""
    pairs = {
        module: pair._replace(a=pair.a.bfloat16(), b=pair.b.bfloat16())
        for module, pair in adapter.pairs.items()
    }
    return LoraAdapter(adapter.id, adapter.content_hash, pairs)


def deltas(parts: list[tuple[LoraAdapter, float]]) -> dict[str, torch.Tensor]:
    return {
        module: sum(
            (weight * adapter.delta(module) for adapter, weight in parts if module in adapter.pairs),
            torch.zeros(shape, dtype=torch.float64),
        )
        for module, shape in BASE.modules.items()
    }


@pytest.mark.parametrize(
    ("ranks", "padded"), [((3, 4), 8), ((8,), 8), ((5, 4), 16), ((1,), 1), ((9, 9, 9), 32)]
)
def test_an_exact_blend_is_the_weighted_sum_padded(ranks: tuple[int, ...], padded: int) -> None:
    parts = [(small_adapter(f"e{i}", rank), 0.25 * (i + 1)) for i, rank in enumerate(ranks)]
    made = materialise(blend_of(parts), parts, RANKS, truncate=True)
    assert (made.method, made.rank, made.relative_error) == ("exact", sum(ranks), 0.0)
    assert set(made.adapter.ranks.values()) == {padded}
    assert all(pair.scale == 1.0 for pair in made.adapter.pairs.values())
    for module, expected in deltas(parts).items():
        torch.testing.assert_close(made.adapter.delta(module), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_factors_are_scaled_in_float32() -> None:
    """The factors keep their bits, and the weights are rounded to float32, not to bfloat16."""
    exact = [(small_adapter(name, 4), weight) for name, weight in (("a", 0.37), ("b", -1.13))]
    parts = [(halved(one), weight) for one, weight in exact]
    made = materialise(blend_of(parts), parts, RANKS, truncate=True)
    assert {pair.a.dtype for pair in made.adapter.pairs.values()} == {torch.bfloat16}
    for module, expected in deltas(parts).items():
        torch.testing.assert_close(made.adapter.delta(module), expected, rtol=1e-5, atol=1e-5)


def test_modules_that_only_some_experts_have() -> None:
    some = sorted(BASE.modules)[:3]
    parts = [(small_adapter("a", 4), 0.5), (small_adapter("b", 6, some), 0.5)]
    made = materialise(blend_of(parts), parts, RANKS, truncate=True)
    assert set(made.adapter.ranks.values()) == {16}
    for module, expected in deltas(parts).items():
        torch.testing.assert_close(made.adapter.delta(module), expected, rtol=1e-5, atol=1e-5)


def test_a_wide_blend_becomes_its_best_approximation_and_says_how_far_it_is() -> None:
    parts = [(small_adapter(name, 12), 0.5) for name in "abc"]
    made = materialise(blend_of(parts), parts, (1, 8, 16), truncate=True)
    assert (made.method, made.rank) == ("svd", 16)
    whole = torch.cat([value.flatten() for value in deltas(parts).values()])
    found = torch.cat([made.adapter.delta(module).flatten() for module in BASE.modules])
    assert made.relative_error == pytest.approx(float((found - whole).norm() / whole.norm()), rel=1e-4)
    assert made.relative_error > 0.01
    for module, expected in deltas(parts).items():
        values = torch.linalg.svdvals(expected)
        best = float(values[16:].norm())
        assert float((made.adapter.delta(module) - expected).norm()) == pytest.approx(
            best, rel=1e-3, abs=1e-5
        )


def test_a_wide_blend_is_refused_where_it_may_not_be_approximated() -> None:
    parts = [(small_adapter(name, 12), 0.5) for name in "ab"]
    with pytest.raises(TooWide, match="rank 24 and the backend takes 16"):
        materialise(blend_of(parts), parts, (1, 8, 16), truncate=False)
    ties = [(small_adapter(name, 20), 0.5) for name in "ab"]
    with pytest.raises(TooWide, match="ties blend has rank 20"):
        materialise(blend_of(ties, "ties"), ties, (1, 8, 16), truncate=True)


@pytest.mark.parametrize("method", ["svd", "linear", "ties", "magnitude_prune"])
def test_other_methods_are_what_they_are_without_a_backend(method: str) -> None:
    parts = [(small_adapter(name, 4), weight) for name, weight in (("a", 0.6), ("b", 0.4))]
    blend = blend_of(parts, method)
    made = materialise(blend, parts, RANKS, truncate=True)
    expected = merge(parts, method, density=blend.density)
    assert made.relative_error == pytest.approx(expected.relative_error, rel=1e-4)
    for module in BASE.modules:
        torch.testing.assert_close(
            made.adapter.delta(module), expected.adapter.delta(module), rtol=1e-4, atol=1e-4
        )


def test_what_leaves_the_range_is_refused() -> None:
    adapter = small_adapter("a", 4)
    pairs = {module: pair._replace(scale=1e38) for module, pair in adapter.pairs.items()}
    parts = [(LoraAdapter("a", "hash", pairs), 60.0)]
    with pytest.raises(BlendError, match="leaves the range of float32"):
        materialise(blend_of(parts), parts, RANKS, truncate=True)


def test_peft_computes_the_same_from_the_files(tmp_path: Path) -> None:
    parts = [(small_adapter("a", 3), 0.7), (small_adapter("b", 5), -0.4)]
    made = materialise(blend_of(parts), parts, RANKS, truncate=True)
    write_lora(made.adapter, tmp_path, "tiny")
    model = small_llama()
    expected = {
        name: module.weight.double() for name, module in model.named_modules() if name in BASE.modules
    }
    sums = deltas(parts)
    merged = PeftModel.from_pretrained(model, str(tmp_path)).merge_and_unload()
    for name, weight in expected.items():
        found = merged.get_submodule(name).weight.double()
        torch.testing.assert_close(found, weight + sums[name], rtol=1e-5, atol=1e-5)
