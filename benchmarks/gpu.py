"""What needs a CUDA GPU: the operator, decoding a 7 B-shaped 4-bit base, and merging on the device."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from benchmarks.bench import Bench
from benchmarks.decode import bare, case, distinct
from benchmarks.oracle import Wrong
from benchmarks.report import Result, at_least, at_most, ratios
from benchmarks.rig import WEIGHTS, alternate
from benchmarks.shapes import SPREAD, Shape
from loramux.adapters.arena import Arena
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.layers import AdapterLayers
from loramux.adapters.lora import LoraAdapter, LoraPair
from loramux.adapters.merge import merge
from loramux.kernels.gated_lora import GateSlot, Plan, dense_gate, gated_lora_reference, plan_step
from tests.tiny import random_adapter

REQUESTS = 16
# Large enough that a layer without its experts is far outside every tolerance.
LARGE = 0.1
CALLS = 200
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class OneLayer(nn.Module):
    """A projection of the model's width, which the adapter layers can be put around."""

    def __init__(self, width: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False, dtype=dtype, device=device).requires_grad_(False)


class Operator:
    """A layer with one expert a request, and the same layer bare."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self.model = model = OneLayer(shape.hidden, dtype, device)
        self.bare: nn.Module = model.proj
        shapes = BaseShapes.from_model(model, shape.name)
        self.arena = Arena(shapes, REQUESTS * shape.rank, dtype=dtype, device=device)
        slots = [self._slot(random_adapter(shapes, shape.rank, f"e{n}", LARGE)) for n in range(REQUESTS)]
        self.layers = AdapterLayers(model, self.arena)
        self.plan: Plan = plan_step([(slot, 1) for slot in slots])
        self.x = torch.randn(REQUESTS, shape.hidden, dtype=dtype, device=device)

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """The layer as a step finds it: while a plan runs, another module stands where the bare one was."""
        found: torch.Tensor = self.model.proj(x)
        return found

    def _slot(self, adapter: LoraAdapter) -> GateSlot:
        extents = self.arena.allocate(adapter.max_rank)
        self.arena.write(adapter, extents)
        return GateSlot(extents, torch.full((adapter.max_rank,), 0.7), frozenset(adapter.pairs))

    def error(self) -> float:
        """Relative distance from the reference, which computes in float32."""
        rows = self.arena.rows
        gate = dense_gate(self.plan, REQUESTS, rows).to(self.x.device)
        base = self.bare(self.x).float()
        wanted = gated_lora_reference(base, self.x, self.arena.a["proj"], self.arena.b["proj"], gate)
        with self.layers.running(self.plan):
            found = self.gated(self.x).float()
        return float((found - wanted).norm() / wanted.norm())


async def gated_lora(bench: Bench) -> Result:
    """One decode step of 16 requests with 16 experts through one projection, in every type."""
    result = Result()
    for dtype, tolerance in TOLERANCE.items():
        name = str(dtype).removeprefix("torch.")
        bench.progress(name)
        operator = Operator(bench.shape, dtype, bench.device)
        error = operator.error()
        if not error <= tolerance:
            raise Wrong(f"gated_lora in {name} is off by {error:.1e} > {tolerance:.0e}; nothing was timed")
        base, gated = [], []
        for _ in range(bench.repeats):
            base.append(seconds(partial(operator.bare, operator.x)))
            with operator.layers.running(operator.plan):
                gated.append(seconds(partial(operator.gated, operator.x)))
        result.add(f"{name}: relative error", error, "")
        result.add(f"{name}: bare layer", [1e6 * value for value in base], "µs")
        result.add(f"{name}: with 16 experts", [1e6 * value for value in gated], "µs")
        result.add(f"{name}: with experts, of bare", ratios(gated, base), "ratio")
    return result


def seconds(work: Callable[[], object]) -> float:
    """Of one call, the mean of many, launches included."""
    for _ in range(10):
        work()
    _wait()
    started = time.perf_counter()
    for _ in range(CALLS):
        work()
    _wait()
    return (time.perf_counter() - started) / CALLS


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


async def decode_nf4(bench: Bench) -> Result:
    """16 requests over 16 blends on a 4-bit base, against the bare base."""
    rig = await bench.rig()
    found = await alternate(
        {
            "base": case(rig, bare(REQUESTS), prompt=32, tokens=bench.tokens),
            "16 blends": case(rig, distinct(rig, REQUESTS, 16), prompt=32, tokens=bench.tokens),
        },
        max(1, 2 * bench.repeats - 1),
        bench.progress,
    )
    rates = {kind: [drive.throughput for drive in drives] for kind, drives in found.items()}
    result = Result(facts={"device bytes": torch.cuda.max_memory_allocated()})
    for kind, values in rates.items():
        result.add(f"16 requests, {kind}", values, "tokens/s")
    of_base = ratios(rates["16 blends"], rates["base"])
    result.add("16 requests, 16 blends: of base", of_base, "ratio", bench.goal(at_least(0.90)))
    return result


async def merge_exact(bench: Bench) -> Result:
    """Three experts of the model's shapes, merged by `exact` on the device."""
    bench.progress("making three experts")
    config = bench.shape.config()
    modules: dict[str, tuple[int, int]] = {}
    for layer in range(config.num_hidden_layers):
        path, wide, ffn = f"model.layers.{layer}", config.hidden_size, config.intermediate_size
        modules |= {f"{path}.self_attn.{name}_proj": (wide, wide) for name in "qkvo"}
        modules |= {f"{path}.mlp.{name}_proj": (ffn, wide) for name in ("gate", "up")}
        modules[f"{path}.mlp.down_proj"] = (wide, ffn)
    shapes = BaseShapes(bench.shape.name, modules)
    made = [random_adapter(shapes, bench.shape.rank, f"e{n}", SPREAD) for n in range(3)]
    experts = [_on_device(adapter, bench.device) for adapter in made]
    parts = list(zip(experts, WEIGHTS, strict=True))
    probe = next(iter(modules))
    wanted = torch.stack([weight * expert.delta(probe) for expert, weight in parts]).sum(dim=0)
    found = merge(parts, "exact").adapter.delta(probe)
    if (error := float((found - wanted).norm() / wanted.norm())) > 1e-2:
        raise Wrong(f"exact on the device is off by {error:.1e}; nothing was timed")
    result = Result()
    times = [_synchronised(parts) for _ in range(bench.repeats)]
    result.add("exact merge of 3 experts", [1e3 * value for value in times], "ms", bench.goal(at_most(5.0)))
    return result


def _on_device(adapter: LoraAdapter, device: str) -> LoraAdapter:
    pairs = {
        module: LoraPair(pair.a.to(device, torch.bfloat16), pair.b.to(device, torch.bfloat16), pair.scale)
        for module, pair in adapter.pairs.items()
    }
    return LoraAdapter(adapter.id, adapter.content_hash, pairs)


def _synchronised(parts: Sequence[tuple[LoraAdapter, float]]) -> float:
    _wait()
    started = time.perf_counter()
    merge(parts, "exact")
    _wait()
    return time.perf_counter() - started
