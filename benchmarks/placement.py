"""Where blends go: the same requests at replicas, placed by affinity, at random and by load."""

import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.latency import percentile
from loramux.adapters.arena import row_bytes as arena_row_bytes
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.peft_format import write_lora
from loramux.server.app import shut_down
from loramux.server.events import Delta
from loramux.server.memory.blueprint import Blueprint
from loramux.server.replicas.build import build_edge
from loramux.server.replicas.placement import Affinity
from loramux.server.settings import load_settings
from loramux.server.wire.completions import CompletionRequest
from loramux.server.wire.strict import parse
from tests.kit import DEMO_POOL
from tests.tiny import random_adapter

BASE = "loramux-demo-base"


class Random(Affinity):
    """Does not know what is where."""

    def order(self, replicas: Sequence[Any], wish: Any) -> list[Any]:  # noqa: ARG002
        return random.sample(list(replicas), len(replicas))


class LeastLoaded(Affinity):
    """Knows the loads alone."""

    def order(self, replicas: Sequence[Any], wish: Any) -> list[Any]:  # noqa: ARG002
        return sorted(replicas, key=lambda one: (one.load, random.random()))


WAYS: dict[str, Callable[[], Affinity]] = {
    "affinity": Affinity, "random": Random, "least-loaded": LeastLoaded
}  # fmt: skip


async def placement(
    total: int, blends: int, experts: int, room: int, among: int, concurrency: int, tokens: int, turns: int
) -> dict[str, Any]:
    """The same requests under three ways to place them: bytes of adapters that were copied in, and the time
    to the first token."""
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_experts(Path(folder), experts)
        for turn in range(turns):
            for way in ("affinity", "random", "least-loaded")[:: -1 if turn % 2 else 1]:
                one = await placed(
                    way, Path(folder), total, blends, experts, room, among, concurrency, tokens, turn
                )
                for name, value in one.items():
                    found.setdefault(way, {}).setdefault(name, []).append(value)
                print(f"placement, {turn + 1} of {turns}: {way} {one}", file=sys.stderr, flush=True)
    medians = {way: {n: statistics.median(v) for n, v in lines.items()} for way, lines in found.items()}
    return {
        "requests": total,
        "blends": blends,
        "experts": experts,
        "experts_that_fit_on_a_replica": room,
        "replicas": among,
        "concurrency": concurrency,
        "turns": turns,
        "found": medians,
        "fewer_bytes_than_random": medians["random"]["moved_mib"] / medians["affinity"]["moved_mib"],
        "first_token_p99_over_least_loaded": medians["affinity"]["first_token_p99_ms"]
        / medians["least-loaded"]["first_token_p99_ms"],
        "goal": "2 x fewer bytes than random, first-token p99 no worse than least-loaded",
    }


def write_experts(folder: Path, count: int) -> None:
    """Random rank-8 adapters for the base of the demo pool."""
    torch.manual_seed(0)
    shapes = base_shapes()
    for number in range(count):
        write_lora(random_adapter(shapes, 8, f"x{number}", 0.02), folder / f"x{number}", BASE)


async def placed(
    way: str, root: Path, total: int, blends: int, experts: int, room: int, among: int,
    concurrency: int, tokens: int, seed: int,
) -> dict[str, float]:  # fmt: skip
    """One run in processes of its own."""
    flags: dict[str, Any] = {
        "pool": DEMO_POOL, "device": "cpu", "dtype": "float32", "log_level": "error", "admin_key": "admin",
        "replicas": among, "adapter_root": root,
        "residency": {"preload": False, "rows": 8 * room, "bytes": 8 * room * row_bytes(), "sparse_bytes": 0},
    }  # fmt: skip
    parts = await asyncio.to_thread(build_edge, load_settings(flags=flags), affinity=WAYS[way]())
    await parts.engine.start()
    parts.lifecycle.ready()
    try:
        for name in [f"x{number}" for number in range(experts)]:
            await parts.admin.load(name, name)
        chooser = random.Random(seed)
        sets: list[list[str]] = []
        while len(sets) < blends:
            one = sorted(chooser.sample([f"x{number}" for number in range(experts)], 3))
            if one not in sets:
                sets.append(one)
        weights = [1 / (rank + 1) for rank in range(blends)]
        asked = iter(chooser.choices(sets, weights, k=total))
        firsts: list[float] = []

        async def worker() -> None:
            for one in asked:
                firsts.append(await first_token(parts, one, tokens))  # noqa: PERF401

        await asyncio.gather(*(worker() for _ in range(concurrency)))
        await asyncio.sleep(0.6)  # until every replica has told its last
        moved = parts.residency.stats().moved_bytes
        loads = [one.moved_bytes for one in parts.fleet.stats()] if parts.fleet is not None else []
    finally:
        await shut_down(parts)
    return {
        "moved_mib": moved / 2**20,
        "most_moved_by_one_mib": max(loads) / 2**20,
        "first_token_p50_ms": 1e3 * percentile(firsts, 50),
        "first_token_p99_ms": 1e3 * percentile(firsts, 99),
    }


def base_shapes() -> BaseShapes:
    """Of the demo pool's base."""
    return Blueprint.read(str(DEMO_POOL / "base")).shapes(BASE)


def row_bytes() -> int:
    """Of one adapter row of the demo base in float32."""
    return arena_row_bytes(base_shapes(), torch.float32)


async def first_token(parts: Any, experts: Sequence[str], tokens: int) -> float:
    """Run one request to its end; seconds to its first token."""
    lora = [{"id": name, "scale": weight} for name, weight in zip(experts, (0.5, 0.3, 0.2), strict=True)]
    body = {"model": "auto", "prompt": "Tell me about it", "lora": lora, "max_tokens": tokens,
            "temperature": 0, "ignore_eos": True}  # fmt: skip
    began = time.perf_counter()
    asked = parse(CompletionRequest, body, parts.settings.limits)
    ask = await parts.intake.completion(asked)
    first = 0.0
    async for event in parts.pipeline.run(ask):
        if isinstance(event, Delta) and event.tokens and not first:
            first = time.perf_counter() - began
    return first
