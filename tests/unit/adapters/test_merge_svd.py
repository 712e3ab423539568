"""The svd merge is the best approximation by its rank, though it never sees the dense sum."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loramux.adapters.lora import LoraAdapter, LoraPair
from loramux.adapters.merge import merge
from loramux.adapters.peft_format import read_lora
from tests.peft_kit import BASE, distance, peft_merge, save_peft, small_adapter, weighted_sum

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

Parts = Sequence[tuple[LoraAdapter, float]]


def exact_sum(parts: Parts) -> dict[str, Tensor]:
    return weighted_sum([({m: part.delta(m) for m in part.pairs}, weight) for part, weight in parts])


def best(deltas: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Tensor], float]:
    """Dense truncation in float64, and its relative error over all modules."""
    kept, lost, total = {}, 0.0, 0.0
    for module, delta in deltas.items():
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        kept[module] = (u[:, :rank] * s[:rank]) @ vh[:rank]
        lost += float((s[rank:] ** 2).sum())
        total += float((s**2).sum())
    return kept, (lost / total) ** 0.5


@pytest.mark.parametrize("rank", [1, 3, 4, 9, 11])
def test_it_is_the_dense_truncation(rank: int) -> None:
    parts = [(small_adapter("a"), 0.6), (small_adapter("b"), -0.3), (small_adapter("c"), 0.9)]
    merged = merge(parts, "svd", rank=rank)
    wanted, error = best(exact_sum(parts), rank)
    assert merged.rank == rank
    assert distance(merged.adapter, wanted) < 1e-6
    assert merged.relative_error == pytest.approx(error, rel=1e-5)


def test_peft_svd_agrees_on_plain_lora(tmp_path: Path) -> None:
    weights = {"a": 0.7, "b": -0.4, "c": 0.25}
    for name in weights:
        save_peft(tmp_path / name, r=4, lora_alpha=8)
    parts = [(read_lora(tmp_path / name, id=name, base=BASE), weight) for name, weight in weights.items()]
    judged = peft_merge({name: tmp_path / name for name in weights}, weights, "svd", svd_full_matrices=False)
    assert distance(merge(parts, "svd").adapter, judged) < 1e-5


def test_the_default_rank_is_the_largest_of_the_parts() -> None:
    assert merge([(small_adapter("a", 2), 1.0), (small_adapter("b", 5), 1.0)], "svd").rank == 5


def test_enough_rank_loses_nothing() -> None:
    parts = [(small_adapter("a", 2), 0.6), (small_adapter("b", 5), -0.3)]
    merged = merge(parts, "svd", rank=7)
    assert distance(merged.adapter, exact_sum(parts)) < 1e-7
    assert merged.relative_error < 1e-6
    assert merge(parts, "svd", rank=4000).rank == 7


def test_modules_that_fit_the_rank_stay_exact() -> None:
    modules = list(BASE.modules)
    parts = [(small_adapter("a", 4), 0.6), (small_adapter("b", 4, modules[:3]), -0.3)]
    merged = merge(parts, "svd").adapter
    wanted = exact_sum(parts)
    truncated, _ = best(wanted, 4)
    assert distance(merged, {m: truncated[m] if m in modules[:3] else wanted[m] for m in modules}) < 1e-6


def test_one_adapter_can_be_compressed() -> None:
    parts = [(small_adapter("a", 6), -1.5)]
    wanted, error = best(exact_sum(parts), 2)
    merged = merge(parts, "svd", rank=2)
    assert distance(merged.adapter, wanted) < 1e-6
    assert merged.relative_error == pytest.approx(error, rel=1e-5)


def test_mixed_scales_and_large_ranges() -> None:
    """The norm of a delta may sit in A or in B; the result must not depend on which."""
    a, b = small_adapter("a"), small_adapter("b")
    skewed = {m: LoraPair(p.a * 1e-6, p.b * 1e6, p.scale) for m, p in b.pairs.items()}
    parts = [(a, 0.6), (LoraAdapter("b", "b", skewed), -0.3)]
    wanted, _ = best(exact_sum(parts), 4)
    merged = merge(parts, "svd").adapter
    assert distance(merged, wanted) < 1e-6
    pair = next(iter(merged.pairs.values()))
    assert 0.1 < float(pair.a.norm() / pair.b.norm()) < 10


def _twins(gap: float) -> Parts:
    """Two adapters whose A's differ by `gap`, as those trained from one initial A do."""
    a = small_adapter("a")
    moved = {
        m: LoraPair(p.a + gap * torch.randn_like(p.a), torch.randn_like(p.b), p.scale)
        for m, p in a.pairs.items()
    }
    return [(a, 0.5), (LoraAdapter("b", "b", moved), 0.5)]


@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-5, 1e-3, 1e-1])
def test_nearly_dependent_rows_are_handled(gap: float) -> None:
    parts = _twins(gap)
    wanted, error = best(exact_sum(parts), 3)
    merged = merge(parts, "svd", rank=3)
    assert distance(merged.adapter, wanted) < 1e-5
    assert merged.relative_error == pytest.approx(error, rel=1e-4, abs=1e-6)


def test_rank_deficient_and_empty_modules() -> None:
    """Zero rows, zero modules and sums of lower rank than asked for."""
    a, b = small_adapter("a"), small_adapter("b")
    modules = list(a.pairs)
    pairs = dict(b.pairs)
    pairs[modules[0]] = LoraPair(pairs[modules[0]].a * 0, pairs[modules[0]].b, 1.0)
    pairs[modules[1]] = LoraPair(pairs[modules[1]].a, pairs[modules[1]].b * 0, 1.0)
    hollow = LoraAdapter("b", "b", pairs)
    parts = [(a, 0.5), (hollow, 0.7), (a, -0.25)]
    wanted, error = best(exact_sum(parts), 8)
    merged = merge(parts, "svd", rank=8)
    assert all(pair.a.isfinite().all() and pair.b.isfinite().all() for pair in merged.adapter.pairs.values())
    assert distance(merged.adapter, wanted) < 1e-5
    assert error < 1e-7
    assert merged.relative_error < 1e-5


def test_a_sum_of_zero_stays_zero() -> None:
    a = small_adapter("a")
    merged = merge([(a, 0.5), (a, -0.5)], "svd", rank=3)
    size = max(float(a.delta(m).norm()) for m in a.pairs)
    assert max(float(merged.adapter.delta(m).norm()) for m in a.pairs) < 1e-6 * size


def test_the_error_counts_rounding_to_the_storage_type() -> None:
    parts = []
    for name, weight in (("a", 0.6), ("b", 0.3)):
        half = {
            m: LoraPair(p.a.bfloat16(), p.b.bfloat16(), p.scale) for m, p in small_adapter(name).pairs.items()
        }
        parts.append((LoraAdapter(name, name, half), weight))
    merged = merge(parts, "svd", rank=7)
    assert merged.adapter.dtype == torch.bfloat16
    assert merged.relative_error == pytest.approx(distance(merged.adapter, exact_sum(parts)), rel=1e-4)


def test_many_modules_are_taken_in_chunks() -> None:
    shapes = {f"m{i:02}": (300, 200) for i in range(40)}
    parts = []
    for name, weight in (("a", 0.6), ("b", 0.3), ("c", 0.1)):
        pairs = {m: LoraPair(torch.randn(8, i), torch.randn(o, 8), 1.0) for m, (o, i) in shapes.items()}
        parts.append((LoraAdapter(name, name, pairs), weight))
    merged = merge(parts, "svd")
    wanted, error = best(exact_sum(parts), 8)
    assert distance(merged.adapter, wanted) < 1e-5
    assert merged.relative_error == pytest.approx(error, rel=1e-5)
