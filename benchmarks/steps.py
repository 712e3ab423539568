"""Steps a second of the engine, whatever runs in them, and how busy they keep the device."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench import Bench
from benchmarks.report import Goal, Result, at_least, ratios
from benchmarks.rig import Rig, alternate
from benchmarks.sparse import tamed
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.blend import Blend
from loramux.adapters.residency import Handle
from loramux.adapters.sparse.slot import SparseSlot, place
from loramux.server.engine.protocol import Sampling
from loramux.server.memory.blueprint import loaded_bytes
from tests.unit.adapters.sparse.random_models import loracoe, loramoe, mixlora

REQUESTS = (1, 16, 32)
SAMPLED = Sampling(0, temperature=0.8, top_p=0.95, seed=1)
RANK, EXPERTS = 16, 8


@dataclass(frozen=True)
class Load:
    """What every request of a run asks for: a blend or a sparse model, greedily or sampled."""

    blends: Sequence[Blend]
    slot: SparseSlot | None = None
    sampling: Sampling | None = None


async def steps(bench: Bench) -> Result:
    """Decoding with 1, 16 and 32 requests: the base, one blend, a blend each, sampled, and sparse models."""
    rig = await bench.rig()
    result = Result(facts={"context": bench.context})
    sparse = sparse_slots(rig)
    copied = copied_bytes_per_second(rig.model.device)
    floor = weight_bytes(rig) / copied
    result.add("copied bytes a second", copied / 1e9, "GB/s")
    result.add("floor: bytes of a step of the base, over copied bytes a second", 1e3 * floor, "ms")
    for requests in REQUESTS:
        name = f"{requests} request{'s' if requests > 1 else ''}"
        bare = [Blend.bare()] * requests
        loads = {
            "base": Load(bare),
            "one blend": Load([rig.mixture(0)] * requests),
            "a blend each": Load([rig.mixture(n % 16) for n in range(requests)]),
            "base, sampled": Load(bare, sampling=SAMPLED),
            **{kind: Load(bare, slot) for kind, slot in sparse.items()},
        }
        found = await alternate(
            {kind: decoding(rig, load, bench.context, bench.tokens) for kind, load in loads.items()},
            bench.repeats,
            bench.telling(name),
        )
        for kind, rates in found.items():
            result.add(f"{name}, {kind}", rates, "tokens/s")
            if kind != "base":
                of_base = ratios(rates, found["base"])
                result.add(f"{name}, {kind}: of base", of_base, "ratio", goal(bench, kind))
    result.add("16 requests, base: device busy", await busy(rig, bench, 16), "share")
    prompts = [await prefill(rig, bench.context) for _ in range(bench.repeats)]
    result.add(f"16 prompts of {bench.context} tokens", prompts, "tokens/s")
    return result


def goal(bench: Bench, kind: str) -> Goal | None:
    """What the ratio to the base should keep."""
    goals = {
        "a blend each": at_least(0.90),
        "base, sampled": at_least(0.95),
        "MixLoRA": at_least(1 / 1.29),
        "LoRACoE": at_least(1 / 1.15),
    }
    return bench.goal(goals[kind]) if kind in goals else None


def sparse_slots(rig: Rig) -> dict[str, SparseSlot]:
    """A model of each kind, with random factors, ready to be served."""
    shapes = BaseShapes.from_model(rig.model, "benchmark")
    models = {
        "MixLoRA": mixlora(shapes, experts=EXPERTS, rank=RANK, scale=2.0),
        "LoRACoE": loracoe(shapes, experts=2, rank=RANK),
        "LoRAMoE": loramoe(shapes, experts=EXPERTS, rank=RANK),
    }
    slots = {}
    for kind, model in models.items():
        slots[kind] = place(tamed(model), rig.model.device, rig.model.dtype)
        rig.layers.prepare(slots[kind])
    return slots


def decoding(rig: Rig, load: Load, context: int, tokens: int) -> Callable[[], Awaitable[float]]:
    """Answer tokens a second once every prompt is done."""

    async def run() -> float:
        handle = None if load.slot is None else Handle(f"slot {id(load.slot)}", load.slot)
        drive = await rig.drive(
            load.blends, prompt=context, tokens=tokens, sampling=load.sampling, handle=handle
        )
        return drive.decode_rate

    return run


async def prefill(rig: Rig, context: int) -> float:
    """Prompt tokens a second of sixteen prompts at once."""
    return (await rig.drive([Blend.bare()] * 16, prompt=context, tokens=1)).prefill_rate


async def busy(rig: Rig, bench: Bench, requests: int) -> float:
    """The share of the time of decode steps in which the device computes."""
    on_cuda = rig.model.device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
    drive = asyncio.create_task(
        rig.drive([Blend.bare()] * requests, prompt=16, tokens=max(8, 4 * bench.tokens))
    )
    while rig.engine.stats().decode_tokens == 0 and not drive.done():
        await asyncio.sleep(0.001)
    with profile(activities=[activity]) as profiler:
        started = time.perf_counter()
        await asyncio.sleep(0.3 if on_cuda else 0.05)
        seconds = time.perf_counter() - started
    await drive
    name = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    total = sum(float(getattr(event, name)) for event in profiler.key_averages())
    return min(1.0, total / 1e6 / seconds)


def weight_bytes(rig: Rig) -> int:
    """Bytes that a step of the base has to read."""
    return loaded_bytes(rig.model)


def copied_bytes_per_second(device: torch.device) -> float:
    """Read and written, of a large copy on the device."""
    on_cuda = device.type == "cuda"
    source = torch.zeros(2**30 if on_cuda else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        wait(device)
        started = time.perf_counter()
        for _ in range(4):
            target.copy_(source)
        wait(device)
        best = max(best, 4 * 2 * source.numel() / (time.perf_counter() - started))
    return best


def wait(device: torch.device) -> None:
    """For everything that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
