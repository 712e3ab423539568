"""The exact merge is the float64 sum of w * s * B @ A for every configuration, and so is PEFT's `cat`."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux.adapters.blend import METHOD_OPTIONS
from loramux.adapters.errors import BlendError
from loramux.adapters.lora import LoraAdapter, LoraPair
from loramux.adapters.merge import merge
from loramux.adapters.peft_format import read_lora
from tests.peft_kit import BASE, distance, peft_merge, save_peft, weighted_sum

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 9, "lora_alpha": 5},
    "rank pattern": {"rank_pattern": {"q_proj": 7, "down_proj": 2}},
    "alpha pattern": {"alpha_pattern": {r"layers\.1\..*_proj": 11, "up_proj": 3}},
    "both, rslora": {
        "rank_pattern": {"(q|k)_proj": 3},
        "alpha_pattern": {"model.layers.0.mlp.gate_proj": 1},
        "use_rslora": True,
    },
    "other rank": {"r": 13},
    "two targets": {"target_modules": ["q_proj", "down_proj"]},
    "one layer": {"layers_to_transform": [1], "r": 2},
}


def random_adapter(name: str, ranks: dict[str, int], scale: float = 0.7) -> LoraAdapter:
    pairs = {
        module: LoraPair(
            torch.randn(rank, BASE.modules[module][1]), torch.randn(BASE.modules[module][0], rank), scale + i
        )
        for i, (module, rank) in enumerate(ranks.items())
    }
    return LoraAdapter(name, f"hash {name}", pairs)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_adapter_with_weight_one_gives_itself_back(tmp_path: Path, name: str) -> None:
    deltas = save_peft(tmp_path, **CONFIGS[name])
    adapter = read_lora(tmp_path, id="x", base=BASE)
    for method in METHOD_OPTIONS:
        merged = merge([(adapter, 1.0)], method)
        assert merged.relative_error == 0.0
        assert merged.rank == adapter.max_rank
        assert distance(merged.adapter, deltas) < 1e-15


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_sums_exactly(tmp_path: Path, name: str) -> None:
    deltas, parts = [], []
    for i, fields in enumerate([CONFIGS[name], CONFIGS["plain"], CONFIGS["rank pattern"]]):
        deltas.append(save_peft(tmp_path / str(i), **fields))
        parts.append(read_lora(tmp_path / str(i), id=str(i), base=BASE))
    weights = (0.62, -0.35, 1.7)
    merged = merge(list(zip(parts, weights, strict=True)))
    assert distance(merged.adapter, weighted_sum(list(zip(deltas, weights, strict=True)))) < 1e-7
    assert merged.relative_error == 0.0
    assert merged.rank == max(sum(part.ranks.get(module, 0) for part in parts) for module in BASE.modules)


def test_all_configurations_at_once(tmp_path: Path) -> None:
    parts, wanted = [], []
    for i, fields in enumerate(CONFIGS.values()):
        wanted.append((save_peft(tmp_path / str(i), **fields), 0.9 - 0.3 * i))
        parts.append((read_lora(tmp_path / str(i), id=str(i), base=BASE), 0.9 - 0.3 * i))
    assert distance(merge(parts).adapter, weighted_sum(wanted)) < 1e-7


def test_peft_cat_agrees_on_plain_lora(tmp_path: Path) -> None:
    shapes = {"a": {"r": 4, "lora_alpha": 8}, "b": {"r": 6}, "c": {"r": 2, "lora_alpha": 1}}
    weights = {"a": 0.7, "b": -0.4, "c": 0.25}
    for name, fields in shapes.items():
        save_peft(tmp_path / name, **fields)
    parts = [(read_lora(tmp_path / name, id=name, base=BASE), weights[name]) for name in shapes]
    judged = peft_merge({name: tmp_path / name for name in shapes}, weights, "cat")
    assert distance(merge(parts).adapter, judged) < 1e-7


def test_weights_of_zero_take_no_part(tmp_path: Path) -> None:
    a, b = (random_adapter(name, dict.fromkeys(BASE.modules, 3)) for name in "ab")
    merged = merge([(a, 0.5), (b, 0.0)])
    assert merged.rank == 3
    assert all(torch.equal(merged.adapter.delta(m), 0.5 * a.delta(m)) for m in BASE.modules)


def test_opposite_weights_cancel() -> None:
    a = random_adapter("a", dict.fromkeys(BASE.modules, 3))
    merged = merge([(a, 0.5), (a, -0.5)])
    scale = max(float(a.delta(m).abs().max()) for m in BASE.modules)
    assert max(float(merged.adapter.delta(m).abs().max()) for m in BASE.modules) < 1e-15 * scale


def test_adapters_without_a_common_module() -> None:
    modules = list(BASE.modules)
    a = random_adapter("a", {modules[0]: 2, modules[3]: 5})
    b = random_adapter("b", {modules[1]: 3})
    merged = merge([(a, 2.0), (b, -1.0)]).adapter
    assert merged.ranks == {modules[0]: 2, modules[3]: 5, modules[1]: 3}
    assert torch.equal(merged.delta(modules[1]), -b.delta(modules[1]))


def test_a_module_whose_scale_is_zero_adds_nothing() -> None:
    module = next(iter(BASE.modules))
    a = LoraAdapter("a", "h", {module: random_adapter("a", {module: 2}).pairs[module]._replace(scale=0.0)})
    merged = merge([(a, 1.0), (a, 1.0)]).adapter
    assert not merged.delta(module).any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_half_precision_rounds_once(dtype: torch.dtype, tolerance: float) -> None:
    parts = []
    for name, weight in {"a": 0.7, "b": -0.33, "c": 0.1}.items():
        adapter = random_adapter(name, dict.fromkeys(BASE.modules, 4))
        pairs = {m: LoraPair(p.a.to(dtype), p.b.to(dtype), p.scale) for m, p in adapter.pairs.items()}
        parts.append((LoraAdapter(name, name, pairs), weight))
    merged = merge(parts).adapter
    assert merged.dtype == dtype
    assert (
        distance(merged, weighted_sum([(_deltas(adapter), weight) for adapter, weight in parts])) < tolerance
    )


def test_mixed_types_are_widened() -> None:
    a, b = (random_adapter(name, dict.fromkeys(BASE.modules, 2)) for name in "ab")
    half = {m: LoraPair(p.a.bfloat16(), p.b.bfloat16(), p.scale) for m, p in b.pairs.items()}
    narrow = LoraAdapter("b", "b", half)
    merged = merge([(a, 0.5), (narrow, 0.25)]).adapter
    assert merged.dtype == torch.float32
    assert distance(merged, weighted_sum([(_deltas(a), 0.5), (_deltas(narrow), 0.25)])) < 1e-7


def _deltas(adapter: LoraAdapter) -> dict[str, torch.Tensor]:
    return {module: adapter.delta(module) for module in adapter.pairs}


def test_results_do_not_share_memory_with_each_other_or_change_the_parts() -> None:
    """Results live in recycled mappings; one that is alive must never be handed out again."""
    shapes = {f"m{i}": (700, 600) for i in range(8)}
    pairs = {m: LoraPair(torch.randn(16, i), torch.randn(o, 16), 1.0) for m, (o, i) in shapes.items()}
    a, b = LoraAdapter("a", "a", pairs), LoraAdapter("b", "b", dict(pairs))
    before = {module: a.delta(module) for module in shapes}
    kept = merge([(a, 1.0), (b, 0.5)]).adapter
    for round_ in range(4):
        other = merge([(a, 2.0 + round_), (b, -0.5)]).adapter
        assert torch.allclose(other.delta("m3"), (1.5 + round_) * before["m3"], rtol=1e-5, atol=1e-4)
        view = other.pairs["m5"].a
        del other
        assert torch.equal(view[:16], a.pairs["m5"].a)
    assert torch.allclose(kept.delta("m7"), 1.5 * before["m7"], rtol=1e-5, atol=1e-4)
    assert all(torch.equal(a.delta(module), before[module]) for module in shapes)


def test_the_content_hash_names_the_result() -> None:
    a, b = (random_adapter(name, dict.fromkeys(BASE.modules, 2)) for name in "ab")
    hashes = {
        merge([(a, 0.5), (b, 0.5)]).adapter.content_hash,
        merge([(a, 0.5), (b, 0.4)]).adapter.content_hash,
        merge([(a, 0.5), (b, 0.5)], "svd").adapter.content_hash,
        merge([(a, 0.5), (b, 0.5)], "svd", rank=3).adapter.content_hash,
        merge([(a, 0.5), (b, 0.5)], "dare_linear", seed=1).adapter.content_hash,
        merge([(a, 0.5), (b, 0.5)], "dare_linear", seed=2).adapter.content_hash,
    }
    assert len(hashes) == 6
    swapped = merge([(b, 0.5), (a, 0.5)]).adapter.content_hash
    assert swapped == merge([(a, 0.5), (b, 0.5)], rank=7).adapter.content_hash


def test_what_cannot_be_merged_is_refused() -> None:
    a = random_adapter("a", dict.fromkeys(BASE.modules, 2))
    module = next(iter(BASE.modules))
    misfit = LoraAdapter("misfit", "m", {module: LoraPair(torch.ones(2, 5), torch.ones(6, 2), 1.0)})
    with pytest.raises(BlendError, match="nothing to merge"):
        merge([])
    with pytest.raises(BlendError, match="nothing to merge"):
        merge([(a, 0.0)])
    for weight in (math.nan, math.inf):
        with pytest.raises(BlendError, match="adapter 'a': weight"):
            merge([(a, weight)])
    with pytest.raises(BlendError, match="unknown merge method"):
        merge([(a, 1.0)], "mean")
    with pytest.raises(BlendError, match=f"'a' and 'misfit' differ in the shape of {module}"):
        merge([(a, 1.0), (misfit, 1.0)])
    with pytest.raises(BlendError, match="lie on cpu and meta"):
        merge([(a, 1.0), (LoraAdapter("m", "m", {module: _meta(a.pairs[module])}), 1.0)])


def _meta(pair: LoraPair) -> LoraPair:
    return LoraPair(pair.a.to("meta"), pair.b.to("meta"), pair.scale)
