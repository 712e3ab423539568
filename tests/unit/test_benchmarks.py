"""The benchmark suite runs, on a shape that takes seconds; what it would time is checked first."""

import asyncio
import importlib
import json
import math
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
RUN = ROOT / "benchmarks" / "run.py"

runpy.run_path(str(RUN))["add_package"]("benchmarks")

#: Lines that documents and plots name.
PROMISED = {
    "cold_start": ["process start to /ready", "memory of the process, demo pool"],
    "route": ["idle, 16 callers: p95", "under load, 16 callers: p95", "idle: share of time to first token"],
    "cache_hits": [
        "calibrated temperature, grid 0.01: hits",
        "5 x softer temperature, grid 0.25: hits",
    ],
    "merge": [
        "exact, float32: PEFT cat / ours",
        "exact, bfloat16: PEFT cat / ours",
        "exact, float32, all threads: PEFT cat / ours",
        "exact, as served: PEFT cat / ours",
        "svd, float32: PEFT svd / ours",
        "ties, float32: PEFT ties / ours",
    ],
    "decode": ["1 request, 1 blend: of base", "16 requests, 8 blends: of base"],
    "traffic": ["16 requests, identical: of base", "32 requests, distinct: of base", "32 requests, zipf"],
    "prefill": ["1 x 256 tokens, 1 blend: of base", "16 x 32 tokens, 8 blends: of base"],
    "base_only": ["1 request: with, of without a pool", "16 requests: with, of without a pool"],
    "first_token": ["new exact blend, experts not resident: over cached", "new svd blend: over cached"],
    "streams": [
        "new exact blends, experts not resident: p99, of none",
        "new svd blends, merged: p99, of none",
    ],
    "memory": ["one expert: copied", "another exact blend of the same three: copied"],
    "mixlora": [
        "prefill, 1,024 tokens: ours, of whole experts",
        "decode, 16 requests: ours, of whole experts",
        "block, 1,024 tokens: activations, of whole experts",
    ],
    "loracoe": [
        "decode, 16 requests: LoRACoE, of plain LoRA",
        "prefill, 1,024 tokens: the mixture alone, of unfused",
    ],
    "strategies": [
        "16 requests, arrow: of base",
        "16 requests, spectr: of base",
        "1 x 256 tokens, spectr: of base",
        "spectr: made ready",
        "256 tokens: logo, of the first token",
    ],
    "floor": ["memory, reading", "1 request, base: of the floor"],
    "weights": [
        "256 x 256, tokens: 16, q4_0: float32 / this",
        "int4: base",
        "1 request, bfloat16: of before",
        "16 requests, int4: of before",
    ],
}


@dataclass(frozen=True)
class Suite:
    """What one run of everything said and saved."""

    stdout: str
    saved: Path

    @property
    def found(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return found


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    saved = tmp_path_factory.mktemp("results")
    command = [sys.executable, str(RUN), "--shape", "tiny", "--repeats", "1", "--save", str(saved)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return Suite(done.stdout, saved)


def test_every_scenario_is_promised_something(suite: Suite) -> None:
    assert set(suite.found["scenarios"]) == set(PROMISED)


@pytest.mark.parametrize("scenario", PROMISED)
def test_a_scenario_gives_its_lines(suite: Suite, scenario: str) -> None:
    lines = suite.found["scenarios"][scenario]["lines"]
    assert set(PROMISED[scenario]) <= set(lines)
    assert all(math.isfinite(line["median"]) for line in lines.values())


def test_the_last_line_is_what_is_saved_with_machine_and_versions(suite: Suite) -> None:
    assert json.loads((suite.saved / "cpu-tiny.json").read_text()) == suite.found
    assert suite.found["machine"]["processor"]
    assert suite.found["machine"]["cores"] >= 1
    assert {"python", "torch", "transformers", "peft"} <= set(suite.found["versions"])


def test_every_line_is_in_the_table_for_people(suite: Suite) -> None:
    for scenario, result in suite.found["scenarios"].items():
        assert scenario in suite.stdout
        for what in result["lines"]:
            assert what in suite.stdout


def test_an_exact_blend_of_resident_experts_copies_nothing(suite: Suite) -> None:
    lines = suite.found["scenarios"]["memory"]["lines"]
    assert lines["another exact blend of the same three: copied"]["median"] == 0
    assert lines["their svd blend: copied"]["median"] == lines["one expert: copied"]["median"] > 0


def test_a_coarser_grid_hits_more_often(suite: Suite) -> None:
    lines = suite.found["scenarios"]["cache_hits"]["lines"]
    hits = [line["median"] for what, line in lines.items() if what.startswith("calibrated")]
    assert hits == sorted(hits)
    assert 0 < hits[0] < hits[-1] < 1


def test_the_plot_is_drawn_with_every_ratio(suite: Suite) -> None:
    drawing = (suite.saved / "cpu-tiny.svg").read_text()
    ElementTree.fromstring(drawing)  # noqa: S314 - it is ours
    assert "16 requests, 8 blends" in drawing


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_its_part_is_skipped_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cuda"])
    importlib.import_module("benchmarks.suite").main()
    said = capsys.readouterr()
    assert said.out == ""
    assert "no CUDA GPU" in said.err


def test_a_scenario_of_the_other_device_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "decode_nf4"])
    with pytest.raises(SystemExit):
        importlib.import_module("benchmarks.suite").main()
    assert "decode_nf4" in capsys.readouterr().err


def test_nothing_is_timed_when_the_engine_is_wrong(tmp_path: Path) -> None:
    oracle, rig, shapes = (importlib.import_module(f"benchmarks.{n}") for n in ("oracle", "rig", "shapes"))
    shape = shapes.Shape("small", 256, 512, 2, 4)
    served, other = tmp_path / "served", tmp_path / "other"
    for folder, layers in ((served, 2), (other, 3)):
        folder.mkdir()
        shapes.write_base(shapes.Shape("small", 256, 512, layers, 4), folder, torch.float32)

    async def check() -> None:
        async with rig.running(served, shape) as running:
            await oracle.check(running, served)
            with pytest.raises(oracle.Wrong, match="runs and float64 differ"):
                await oracle.check(running, other)

    asyncio.run(check())


def test_mixtures_differ() -> None:
    steps = importlib.import_module("benchmarks.rig").STEPS
    mixtures = {frozenset([n % 8, *((n + s) % 8 for s in steps[n // 8])]) for n in range(32)}
    assert len(mixtures) == 32
    assert {len(mixture) for mixture in mixtures} == {3}


def test_the_prompt_stream_never_repeats_and_is_the_same_every_time() -> None:
    stream = importlib.import_module("benchmarks.prompts").stream
    assert len(set(stream(2000))) == 2000
    assert stream(50) == stream(50) != stream(50, seed=1)


def test_ratios_are_of_neighbours_and_percentiles_of_values() -> None:
    report, latency = (importlib.import_module(f"benchmarks.{name}") for name in ("report", "latency"))
    assert report.ratios([1.0, 8.0], [2.0, 4.0]) == [0.5, 2.0]
    assert [latency.percentile([3.0, 1.0, 2.0, 4.0], p) for p in (0, 25, 50, 99, 100)] == [1, 1, 2, 4, 4]


def test_a_goal_is_met_from_its_own_side() -> None:
    report = importlib.import_module("benchmarks.report")
    assert [report.at_least(0.9).met(value) for value in (0.89, 0.9, 1.0)] == [False, True, True]
    assert [report.at_most(15).met(value) for value in (14.0, 15.0, 15.1)] == [True, True, False]
    line = report.Line("x", (3.0, 1.0, 2.0), "ms", report.at_most(1.5))
    assert line.json() == {
        "median": 2.0, "unit": "ms", "low": 1.0, "high": 3.0, "repeats": 3, "goal": "≤ 1.5", "met": False,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_operator_of_the_gpu_suite_once_timed_the_bare_layer(dtype: torch.dtype) -> None:
    """The scenario of one layer, on the CPU at a tiny size: what it times is the gated layer, and right."""
    gpu = importlib.import_module("benchmarks.gpu")
    shapes = importlib.import_module("benchmarks.shapes")
    operator = gpu.Operator(shapes.SHAPES["tiny"], dtype, device="cpu")
    assert operator.error() <= gpu.TOLERANCE[dtype]
    with operator.layers.running(operator.plan):
        gated = operator.gated(operator.x)
    bare = operator.bare(operator.x)
    assert (gated - bare).float().norm() > 5 * gpu.TOLERANCE[dtype] * bare.float().norm()
    torch.testing.assert_close(operator.gated(operator.x), bare)
    assert gpu.seconds(lambda: None) > 0


def test_the_steps_of_a_device_run_on_a_cpu_too() -> None:
    """The suite runs this scenario where there is a GPU; what it does is the same here, and as little of it
    as there can be."""
    steps = importlib.import_module("benchmarks.steps")
    bench = importlib.import_module("benchmarks.bench")
    shapes = importlib.import_module("benchmarks.shapes")

    async def run() -> Any:
        async with AsyncExitStack() as stack:
            made = bench.Bench(shapes.SHAPES["tiny"], 1, stack, lambda _: None, context=20, tokens=4)
            return await steps.steps(made)

    found = asyncio.run(run())
    values = {line.what: line.median for line in found.lines}
    assert all(math.isfinite(value) and value > 0 for value in values.values()), values
    for requests in ("1 request", "16 requests", "32 requests"):
        for kind in ("one blend", "a blend each", "base, sampled", "MixLoRA", "LoRACoE", "LoRAMoE"):
            assert f"{requests}, {kind}: of base" in values
    assert values["16 requests, base: device busy"] <= 1


@pytest.mark.parametrize(
    ("scenario", "promised"),
    [
        ("gated_lora", "bfloat16: with experts, of bare"),
        ("decode_nf4", "16 requests, 16 blends: of base"),
        ("merge_exact", "exact merge of 3 experts"),
    ],
)
def test_the_other_scenarios_of_a_device_run_on_a_cpu_too(
    scenario: str, promised: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, bench, shapes = (importlib.import_module(f"benchmarks.{n}") for n in ("gpu", "bench", "shapes"))
    monkeypatch.setattr(gpu, "CALLS", 2)

    async def run() -> Any:
        async with AsyncExitStack() as stack:
            made = bench.Bench(shapes.SHAPES["tiny"], 1, stack, lambda _: None, tokens=3, quantization="nf4")
            return await getattr(gpu, scenario)(made)

    values = {line.what: line.median for line in asyncio.run(run()).lines}
    assert promised in values
    assert all(math.isfinite(value) and value > 0 for value in values.values()), values
