"""Merging three experts: ours against PEFT's `add_weighted_adapter`.

Runs alternate between the two. Both wall time and CPU time of the process are kept; the second is the one to
trust on a machine that does other work as well. PEFT's `svd` runs on all layers if one layer predicts less
than the limit, else on one layer and is scaled up; its line says which. The experts are saved by PEFT and
read by us, so both merge the same numbers in the same type, with one thread, as a merge runs beside
decoding; `exact` also with all threads, as a program of its own would run it, and as it is served: over
experts that are resident, where it is a gate and copies nothing.
"""

import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.bench import Bench
from benchmarks.oracle import Wrong
from benchmarks.report import Result, at_least, ratios
from benchmarks.shapes import Shape
from loramux.adapters.arena import Arena
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.blend import Blend
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.merge import Merged, merge
from loramux.adapters.peft_format import read_lora, write_lora
from loramux.adapters.residency import Residency
from tests.peft_kit import lora_config

WEIGHTS = {"math": 0.6, "code": 0.3, "law": 0.1}
PARTNER = {"exact": "cat"}
METHODS = ("exact", "linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
GOALS = {"exact": 40.0, "svd": 150.0}
DENSITY = 0.5
FULL_SVD_LIMIT_S = 20.0
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SVD_TOLERANCE = 1e-4


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


@dataclass(frozen=True)
class Race:
    """One method: seconds of ours and of PEFT's for all layers, run by run; `fresh` is ours when earlier
    results are kept, so that memory comes fresh from the system."""

    method: str
    dtype: torch.dtype
    ours: Timing
    peft: Timing
    fresh: Timing
    relative_error: float
    peft_measured_on: str
    all_threads: bool = False

    @property
    def name(self) -> str:
        parts = [self.method, str(self.dtype).removeprefix("torch.")]
        return ", ".join([*parts, "all threads"] if self.all_threads else parts)

    def json(self) -> dict[str, Any]:
        """Every run in seconds."""
        return {
            "ours": asdict(self.ours),
            "peft": asdict(self.peft),
            "ours in fresh memory": asdict(self.fresh),
            "relative_error": self.relative_error,
            "peft_measured_on": self.peft_measured_on,
        }


def base_model(shape: Shape, layers: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """The shape with a tiny vocabulary. Nobody reads its weights, so its pages are never touched."""
    config = shape.config(layers)
    config.vocab_size = 64
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return model.to(dtype).to_empty(device="cpu")


def save_experts(folder: Path, shape: Shape) -> None:
    """Three random experts, each written by PEFT to a directory of its name."""
    first, *others = WEIGHTS
    config = lora_config(r=shape.rank, lora_alpha=2 * shape.rank)
    model = get_peft_model(base_model(shape, shape.layers, torch.float32), config, adapter_name=first)
    for name in others:
        model.add_adapter(name, config)
    model.save_pretrained(folder)


class Ours:
    def __init__(self, folder: Path, shape: Shape, dtype: torch.dtype) -> None:
        base = BaseShapes.from_model(base_model(shape, shape.layers, dtype), "base")
        experts = [
            read_lora(folder / name, id=name, base=base, any_base=True, dtype=dtype) for name in WEIGHTS
        ]
        self.base = base
        self.parts = list(zip(experts, WEIGHTS.values(), strict=True))

    def merge(self, method: str) -> Merged:
        return merge(self.parts, method, density=DENSITY)

    def exact_delta(self, module: str) -> Tensor:
        return torch.stack([weight * expert.delta(module) for expert, weight in self.parts]).sum(dim=0)

    def save_first_layer(self, folder: Path) -> None:
        for expert, _ in self.parts:
            kept = {module: pair for module, pair in expert.pairs.items() if ".layers.0." in module}
            write_lora(LoraAdapter(expert.id, expert.content_hash, kept), folder / expert.id, "base")


async def served(ours: Ours, repeats: int) -> list[float]:
    """Seconds until a blend with weights that nobody asked for before can be used, its experts being
    resident."""
    experts = {expert.id: expert for expert, _ in ours.parts}
    arena = Arena(ours.base, sum(expert.max_rank for expert in experts.values()))
    residency = Residency(experts, arena)
    residency.preload()
    taken = []
    for number in range(repeats):
        fresh = [(e.id, e.content_hash, weight - 0.01 * number) for e, weight in ours.parts]
        started = time.perf_counter()
        async with residency.lease(Blend.of(fresh)) as lease:
            taken.append(time.perf_counter() - started)
            if lease.cached:
                raise Wrong("a blend with new weights was found in the cache")
    return taken


class Peft:
    """The three experts in one PEFT model of their type."""

    def __init__(self, folder: Path, shape: Shape, layers: int, dtype: torch.dtype) -> None:
        first, *others = WEIGHTS
        self.layers = layers
        self.model = PeftModel.from_pretrained(
            base_model(shape, layers, dtype), str(folder / first), first, autocast_adapter_dtype=False
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
    """Compare with PEFT, and `exact` with the dense sum too, on every projection of one layer.

    `dare_*` is random by definition and left out; without drops the tests compare it.

    Raises:
        Wrong: a projection is off.
    """
    if method.startswith("dare"):
        return
    merged = ours.merge(method).adapter
    peft.merge(PARTNER.get(method, method))
    for module in (m for m in merged.pairs if f"layers.{peft.layers - 1}." in m):
        found, judges = merged.delta(module), [peft.delta(module)]
        if method == "exact":
            judges.append(ours.exact_delta(module))
        gap = max(float((found - judge).norm() / judge.norm()) for judge in judges)
        if gap > tolerance:
            raise Wrong(f"{method}: {module} is off by {gap:.1e} > {tolerance:.0e}; nothing was timed")
    peft.forget()


def race(ours: Ours, peft: Peft, method: str, shape: Shape, repeats: int, dtype: torch.dtype) -> Race:
    """Alternate the two; PEFT's seconds are scaled up if its model has fewer layers."""
    mine, theirs, fresh = Timing(), Timing(), Timing()
    held = [fresh.run(lambda: ours.merge(method)) for _ in range(repeats)]
    error = ours.merge(method).relative_error
    del held
    ours.merge(method)
    for _ in range(repeats):
        theirs.run(lambda: peft.merge(PARTNER.get(method, method)))
        peft.forget()
        mine.run(lambda: ours.merge(method))
    scale = shape.layers / peft.layers
    scaled = Timing([scale * s for s in theirs.wall], [scale * s for s in theirs.cpu])
    measured = "all layers" if scale == 1 else f"{peft.layers} layer, times {scale:g}"
    return Race(method, dtype, mine, scaled, fresh, error, measured)


def race_svd(ours: Ours, folder: Path, shape: Shape, repeats: int) -> Race:
    """PEFT's svd on all layers if one layer predicts less than the limit, else on one."""
    ours.save_first_layer(folder / "cut")
    one_layer = Peft(folder / "cut", shape, 1, torch.float32)
    probe = Timing()
    probe.run(lambda: one_layer.merge("svd"))
    one_layer.forget()
    check(ours, one_layer, "svd", SVD_TOLERANCE)
    whole = probe.wall[0] * shape.layers < FULL_SVD_LIMIT_S
    peft = Peft(folder, shape, shape.layers, torch.float32) if whole else one_layer
    return race(ours, peft, "svd", shape, repeats, torch.float32)


async def races(
    shape: Shape, repeats: int, progress: Callable[[str], None]
) -> tuple[list[Race], list[float]]:
    """Every method in float32, `exact` in the type that experts are usually served in, and `served`."""
    at_once: list[float] = []
    found: list[Race] = []
    with tempfile.TemporaryDirectory(prefix="loramux-bench-") as name:
        folder = Path(name)
        save_experts(folder, shape)
        for dtype, methods in ((torch.float32, METHODS), (torch.bfloat16, ("exact",))):
            ours, peft = Ours(folder, shape, dtype), Peft(folder, shape, shape.layers, dtype)
            for method in methods:
                progress(f"checking {method}")
                check(ours, peft, method, TOLERANCE[dtype])
            for method in methods:
                progress(f"{method} against PEFT {PARTNER.get(method, method)}")
                found.append(race(ours, peft, method, shape, repeats, dtype))
            progress("exact against PEFT cat, all threads")
            with using_threads(None):
                found.append(replace(race(ours, peft, "exact", shape, repeats, dtype), all_threads=True))
            del peft
            if dtype == torch.float32:
                progress("svd against PEFT svd")
                found.append(race_svd(ours, folder, shape, repeats))
                at_once = await served(ours, repeats)
    return found, at_once


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """Compute with `count` threads; `None` is one for every core."""
    usual = torch.get_num_threads()
    torch.set_num_threads(count or os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


async def merges(bench: Bench) -> Result:
    """All merge methods; most block the event loop, on which nothing else runs meanwhile."""
    with using_threads(1), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        found, at_once = await races(bench.shape, bench.repeats, bench.progress)
    result = Result()
    for one in found:
        has_goal = one.dtype == torch.float32 and (one.all_threads or one.method != "exact")
        limit = GOALS.get(one.method) if has_goal else None
        partner = f"PEFT {PARTNER.get(one.method, one.method)}"
        result.add(f"{one.name}: ours", [1e3 * seconds for seconds in one.ours.wall], "ms")
        result.add(
            f"{one.name}: {partner} / ours",
            ratios(one.peft.wall, one.ours.wall),
            "x",
            bench.goal(at_least(limit)) if limit else None,
        )
        result.facts[one.name] = one.json()
    cat = next(one.peft.wall for one in found if one.method == "exact" and one.all_threads)
    result.add("exact, as served: ours", [1e3 * seconds for seconds in at_once], "ms")
    result.add(
        "exact, as served: PEFT cat / ours", ratios(cat, at_once), "x", bench.goal(at_least(GOALS["exact"]))
    )
    return result
