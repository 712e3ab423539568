"""What a scheduler before several servers reads of one: where the experts are, and how many fit."""

import asyncio
from pathlib import Path

import pytest

from loramux.adapters.arena import Arena
from loramux.adapters.blend import Blend
from loramux.adapters.residency import Residency
from loramux.adapters.sparse.shelf import Shelf
from loramux.server.expert_metrics import (
    MAX_EXPERTS,
    ExpertCollector,
    ExpertPlace,
    ExpertStats,
    expert_stats,
)
from tests.http.serving import BASE, SHAPES, Tray, expert, serving, sparse_model


def test_experts_are_counted_where_they_are() -> None:
    experts = {name: expert(name, rank) for name, rank in (("small", 2), ("large", 6), ("other", 6))}
    residency = Residency(experts, Arena(SHAPES, 8))
    shelf = Shelf(Tray, [sparse_model("coe")])
    gains = {experts["small"].content_hash: 0.25, "of content that is gone": 1.0}
    blend = Blend.of([("small", experts["small"].content_hash, 1.0)])

    async def lease() -> ExpertStats:
        async with residency.lease(blend):
            return expert_stats(residency, shelf, gains)

    stats = asyncio.run(lease())
    assert stats.places == {
        "small": ExpertPlace(2, resident=True, gain=0.25),
        "large": ExpertPlace(6, resident=False),
        "other": ExpertPlace(6, resident=False),
        "coe": ExpertPlace(4, resident=True, kept=True),
    }
    assert stats.room == 1 + 1  # one of the largest fits into eight rows, and the sparse model has its place


def test_a_scheduler_finds_the_experts_and_their_tiers(tmp_path: Path) -> None:
    with serving(tmp_path, sparse=[sparse_model("coe")]) as served:
        gauge = "vllm:lora_adapter_loaded"
        on_host = {"adapter_name": "math", "level": "cpu", "pinned": "false", "rank": "4"}
        assert served.metric(gauge, **on_host) == 1
        assert served.metric("vllm:num_gpu_loaded_lora_adapters", model_name=BASE) == 1
        served.chat("math")
        assert served.metric(gauge, **on_host) == 0
        assert served.metric(gauge, **{**on_host, "level": "gpu"}) == 1
        assert served.metric(gauge, adapter_name="coe", level="gpu", pinned="true", rank="4") == 1
        assert served.metric("vllm:num_gpu_loaded_lora_adapters", model_name=BASE) == 2
        assert served.metric("vllm:num_cpu_loaded_lora_adapters", model_name=BASE) == 2
        assert served.metric("vllm:max_gpu_lora_adapters", model_name=BASE) == 16 + 1


@pytest.mark.parametrize(("folder", "outcome"), [("good", "loaded"), ("bad", "refused")])
def test_loads_are_counted_by_how_they_ended(tmp_path: Path, folder: str, outcome: str) -> None:
    for name in ("good", "bad"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
    (tmp_path / "adapters" / "good" / "ok").touch()
    with serving(tmp_path, admin_key="secret") as served:
        served.http.post(
            "/v1/load_lora_adapter",
            json={"lora_name": "late", "lora_path": folder},
            headers={"authorization": "Bearer secret"},
        )
        counts = {
            one: served.metric("loramux_adapter_loads_total", outcome=one) for one in ("loaded", "refused")
        }
        assert counts == {"loaded": 0, "refused": 0} | {outcome: 1}
        assert served.metric("loramux_adapter_load_seconds_count") == counts["loaded"]


def test_a_large_pool_names_those_on_the_device_and_counts_all() -> None:
    places = {f"e{n}": ExpertPlace(4, resident=n >= 900, gain=0.5) for n in range(1000)}
    places["coe"] = ExpertPlace(4, resident=True, kept=True)
    families = {
        one.name: one for one in ExpertCollector("base", lambda: ExpertStats(places, 100), {}).collect()
    }
    named = [sample.labels["adapter_name"] for sample in families["vllm:lora_adapter_loaded"].samples]
    assert len(named) == MAX_EXPERTS
    assert {"coe", *(f"e{n}" for n in range(900, 1000))} <= set(named)
    assert len(families["loramux_expert_gain_nats"].samples) == MAX_EXPERTS - 1
    assert families["vllm:num_gpu_loaded_lora_adapters"].samples[0].value == 101
    assert families["vllm:num_cpu_loaded_lora_adapters"].samples[0].value == 900
