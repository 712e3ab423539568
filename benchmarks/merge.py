"""Merge three rank-16 experts of a 0.39 B Llama: ours against PEFT's `add_weighted_adapter`.

    python benchmarks/merge.py [--save benchmarks/results/merge.json]

Correctness is checked before anything is timed. Runs alternate between the two; medians are reported, in wall
time and in CPU time of the process (the one to trust on a machine that does other work as well). PEFT's `svd`
runs on all layers if that takes less than three minutes, else on some layers and is scaled up; the table says
which. The experts are saved by PEFT and read by us, so both merge the same numbers in the same type.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.merge import Merged, merge
from loramux.adapters.peft_format import read_lora, write_lora

WEIGHTS = {"math": 0.6, "code": 0.3, "law": 0.1}
PARTNER = {"exact": "cat"}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DENSITY = 0.5
FULL_SVD_LIMIT_S = 180.0
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass
class Timing:
    """Seconds of every run."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def run(self, work: Callable[[], object]) -> object:
        cpu, wall = time.process_time(), time.perf_counter()
        result = work()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        return result


@dataclass
class Row:
    """One line of the table."""

    method: str
    dtype: str
    ours_ms: float
    ours_cpu_ms: float
    ours_fresh_memory_ms: float
    peft_ms: float
    peft_cpu_ms: float
    times_faster: float
    times_less_cpu: float
    relative_error: float
    peft_measured_on: str


def base_model(layers: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """The 0.39 B shape with a tiny vocabulary. Nobody reads its weights, so its pages are never touched."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=64,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return model.to(dtype).to_empty(device="cpu")


def save_experts(folder: Path, layers: int, rank: int) -> None:
    """Three random experts, each written by PEFT to a directory of its name."""
    first, *others = WEIGHTS
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=PROJECTIONS,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    model = get_peft_model(base_model(layers, torch.float32), config, adapter_name=first)
    for name in others:
        model.add_adapter(name, config)
    model.save_pretrained(folder)


class Ours:
    def __init__(self, folder: Path, layers: int, dtype: torch.dtype) -> None:
        base = BaseShapes.from_model(base_model(layers, dtype), "base")
        experts = [
            read_lora(folder / name, id=name, base=base, any_base=True, dtype=dtype) for name in WEIGHTS
        ]
        self.parts = list(zip(experts, WEIGHTS.values(), strict=True))

    def merge(self, method: str) -> Merged:
        return merge(self.parts, method, density=DENSITY)

    def exact_delta(self, module: str) -> Tensor:
        return torch.stack([weight * expert.delta(module) for expert, weight in self.parts]).sum(dim=0)

    def save_first_layers(self, folder: Path, layers: int) -> None:
        for expert, _ in self.parts:
            kept = {m: pair for m, pair in expert.pairs.items() if int(m.split(".")[2]) < layers}
            write_lora(LoraAdapter(expert.id, expert.content_hash, kept), folder / expert.id, "base")


class Peft:
    """The three experts in one PEFT model of their type."""

    def __init__(self, folder: Path, layers: int, dtype: torch.dtype) -> None:
        first, *others = WEIGHTS
        self.layers = layers
        self.model = PeftModel.from_pretrained(
            base_model(layers, dtype), str(folder / first), first, autocast_adapter_dtype=False
        )
        for name in others:
            self.model.load_adapter(str(folder / name), name, autocast_adapter_dtype=False)

    def merge(self, method: str) -> None:
        options = {} if method in ("cat", "svd", "linear") else {"density": DENSITY}
        self.model.add_weighted_adapter(
            list(WEIGHTS), list(WEIGHTS.values()), "merged", combination_type=method, **options
        )

    def forget(self) -> None:
        self.model.delete_adapter("merged")

    def delta(self, module: str) -> Tensor:
        layer = self.model.base_model.model.get_submodule(module)
        a, b = layer.lora_A["merged"].weight.double(), layer.lora_B["merged"].weight.double()
        delta: Tensor = layer.scaling["merged"] * (b @ a)
        return delta.detach()


def check(ours: Ours, peft: Peft, method: str, tolerance: float) -> None:
    """Compare with PEFT, and `exact` with the dense sum too, on every projection of one layer; else stop."""
    if method.startswith("dare"):
        print(f"unchecked  {method}: random by definition; without drops it is checked in the tests")
        return
    merged = ours.merge(method).adapter
    peft.merge(PARTNER.get(method, method))
    for module in (m for m in merged.pairs if f"layers.{peft.layers - 1}." in m):
        found, judges = merged.delta(module), [peft.delta(module)]
        if method == "exact":
            judges.append(ours.exact_delta(module))
        gap = max(float((found - judge).norm() / judge.norm()) for judge in judges)
        if gap > tolerance:
            sys.exit(f"{method}: {module} is off by {gap:.1e} > {tolerance:.0e}; nothing was timed")
    peft.forget()
    print(f"checked    {method} against PEFT {PARTNER.get(method, method)}")


def race(ours: Ours, peft: Peft, method: str, *, repeats: int, layers: int, dtype: torch.dtype) -> Row:
    """Alternate the two and compare medians; PEFT's are scaled up if its model has fewer layers."""
    mine, theirs, fresh = Timing(), Timing(), Timing()
    held = [fresh.run(lambda: ours.merge(method)) for _ in range(3)]
    error = ours.merge(method).relative_error
    del held
    for _ in range(repeats):
        theirs.run(lambda: peft.merge(PARTNER.get(method, method)))
        peft.forget()
        mine.run(lambda: ours.merge(method))
    wall, cpu = statistics.median(mine.wall), statistics.median(mine.cpu)
    scale = layers / peft.layers
    peft_wall, peft_cpu = scale * statistics.median(theirs.wall), scale * statistics.median(theirs.cpu)
    measured = "all layers" if scale == 1 else f"{peft.layers} layers, times {scale:g}"
    return Row(
        method=method,
        dtype=str(dtype).removeprefix("torch."),
        ours_ms=1e3 * wall,
        ours_cpu_ms=1e3 * cpu,
        ours_fresh_memory_ms=1e3 * statistics.median(fresh.wall),
        peft_ms=1e3 * peft_wall,
        peft_cpu_ms=1e3 * peft_cpu,
        times_faster=peft_wall / wall,
        times_less_cpu=peft_cpu / cpu,
        relative_error=error,
        peft_measured_on=measured,
    )


def race_svd(ours: Ours, folder: Path, *, repeats: int, layers: int) -> Row:
    """PEFT's svd on all layers if one layer predicts less than the limit, else on one."""
    ours.save_first_layers(folder / "cut", 1)
    one_layer = Peft(folder / "cut", 1, torch.float32)
    probe = Timing()
    probe.run(lambda: one_layer.merge("svd"))
    one_layer.forget()
    check(ours, one_layer, "svd", 1e-4)
    if probe.wall[0] * layers < FULL_SVD_LIMIT_S:
        whole = Peft(folder, layers, torch.float32)
        return race(ours, whole, "svd", repeats=1, layers=layers, dtype=torch.float32)
    print(
        f"PEFT svd took {probe.wall[0]:.1f} s for one of {layers} layers; its total is scaled up from there"
    )
    return race(ours, one_layer, "svd", repeats=min(3, repeats), layers=layers, dtype=torch.float32)


def print_table(rows: list[Row]) -> None:
    print(
        f"\n{'method':16} {'type':9} {'ours ms':>9} {'cpu ms':>8} {'fresh*':>8} {'PEFT ms':>10} "
        f"{'cpu ms':>10} {'faster':>8} {'less cpu':>9} {'rel. error':>10}  PEFT measured on"
    )
    for r in rows:
        print(
            f"{r.method:16} {r.dtype:9} {r.ours_ms:9.1f} {r.ours_cpu_ms:8.1f} {r.ours_fresh_memory_ms:8.1f} "
            f"{r.peft_ms:10.1f} {r.peft_cpu_ms:10.1f} {r.times_faster:7.1f}x {r.times_less_cpu:8.1f}x "
            f"{r.relative_error:10.4f}  {r.peft_measured_on}"
        )
    print("* wall time when earlier results are kept, so that memory comes fresh from the system\n")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="1: a merge runs beside decoding, not instead")
    parser.add_argument("--save", type=Path, help="also write the JSON line to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", category=FutureWarning)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        save_experts(folder, args.layers, args.rank)
        for dtype, methods in (
            (torch.float32, ("exact", "linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")),
            (torch.bfloat16, ("exact",)),
        ):
            ours, peft = Ours(folder, args.layers, dtype), Peft(folder, args.layers, dtype)
            for method in methods:
                check(ours, peft, method, TOLERANCE[dtype])
            rows += [
                race(ours, peft, method, repeats=args.repeats, layers=args.layers, dtype=dtype)
                for method in methods
            ]
            del peft
            if dtype == torch.float32:
                rows.append(race_svd(ours, folder, repeats=args.repeats, layers=args.layers))
    print_table(rows)
    facts = {
        "cpu": cpu_name(),
        "threads": args.threads,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "peft")},
    }
    shape = {"layers": args.layers, "hidden": 1024, "ffn": 2816, "rank": args.rank, "experts": 3}
    line = json.dumps({"benchmark": "merge", **facts, "model": shape, "rows": [asdict(r) for r in rows]})
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        args.save.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
