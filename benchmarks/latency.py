"""What a new blend costs: the request that asks for it, and those that are decoding meanwhile."""

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from benchmarks.bench import Bench
from benchmarks.report import Result, at_most, ratios
from benchmarks.rig import Drive, Rig, alternate
from loramux.adapters.blend import Blend

#: Streams use the first three, new blends come from the others.
STREAMING = (0, 1, 2)
ARRIVING = (4, 5, 6)
PROMPT = 16


async def first_token(bench: Bench) -> Result:
    """Milliseconds to the first token of one request on an idle engine, blend by blend."""
    rig = await bench.rig()
    fresh = FreshBlends(rig)
    cached = rig.blend(STREAMING)

    async def ask(blend: Blend) -> float:
        drive = await rig.drive([blend], prompt=PROMPT, tokens=1)
        return drive.prefilled - drive.started

    async def not_resident() -> float:
        rig.forget(ARRIVING)
        return await ask(fresh.next())

    cases: dict[str, Callable[[], Awaitable[float]]] = {
        "cached blend": lambda: ask(cached),
        "new exact blend, experts resident": lambda: ask(fresh.next()),
        "new exact blend, experts not resident": not_resident,
        "new svd blend": lambda: ask(fresh.next("svd")),
    }
    await ask(fresh.next())
    found = await alternate(cases, 3 * bench.repeats, bench.progress)
    result = Result()
    for name, seconds in found.items():
        result.add(name, [1e3 * value for value in seconds], "ms")
    for name in list(cases)[1:]:
        pairs = zip(found[name], found["cached blend"], strict=True)
        goal = bench.goal(at_most(15.0)) if "exact" in name else None
        result.add(f"{name}: over cached", [1e3 * (new - old) for new, old in pairs], "ms", goal)
    return result


async def streams(bench: Bench) -> Result:
    """The gaps between tokens of four running streams, while blends arrive and while none does.

    A blend arrives by being leased; its own prompt, which would lengthen a step for whatever reason it came,
    is left out.
    """
    rig = await bench.rig()
    fresh = FreshBlends(rig)
    merged: dict[str, list[int]] = {"exact": [], "svd": []}

    async def run() -> Drive:
        return await rig.drive([rig.blend(STREAMING)] * 4, prompt=PROMPT, tokens=64)

    async def run_beside(method: str) -> Drive:
        async with arrivals(rig, fresh, method) as count:
            drive = await run()
        merged[method].append(len(count))
        return drive

    cases: dict[str, Callable[[], Awaitable[Drive]]] = {
        "none": run,
        "exact": lambda: run_beside("exact"),
        "svd": lambda: run_beside("svd"),
    }
    found = await alternate(cases, bench.repeats, bench.progress)
    result = Result(facts={"blends that arrived": merged})
    p99 = {name: [1e3 * percentile(drive.gaps, 99) for drive in drives] for name, drives in found.items()}
    p50 = {name: [1e3 * percentile(drive.gaps, 50) for drive in drives] for name, drives in found.items()}
    result.add("no blend arrives: p50", p50["none"], "ms")
    result.add("no blend arrives: p99", p99["none"], "ms")
    for method, about in (("exact", "experts not resident"), ("svd", "merged")):
        name = f"new {method} blends, {about}"
        result.add(f"{name}: p99", p99[method], "ms")
        goal = bench.goal(at_most(1.15))
        result.add(f"{name}: p99, of none", ratios(p99[method], p99["none"]), "ratio", goal)
        result.add(f"{name}: p50, of none", ratios(p50[method], p50["none"]), "ratio")
    return result


@asynccontextmanager
async def arrivals(rig: Rig, fresh: "FreshBlends", method: str) -> AsyncIterator[list[float]]:
    """New blends, one after another and at most four a second; yields the seconds each of them took."""
    taken: list[float] = []
    over = asyncio.Event()

    async def arrive() -> None:
        while not over.is_set():
            if method == "exact":
                rig.forget(ARRIVING)
            async with rig.residency.lease(fresh.next(method)) as lease:
                taken.append(lease.seconds)
            await asyncio.sleep(max(0.0, 0.25 - taken[-1]))

    task = asyncio.create_task(arrive())
    try:
        yield taken
    finally:
        over.set()  # a merge that has begun would go on without its task, and into the next run
        await task


class FreshBlends:
    """Blends that nobody has asked for yet."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._random = random.Random(time.monotonic_ns())
        self._seen: set[str] = set()

    def next(self, method: str = "exact") -> Blend:
        """Three experts with weights that were not used before."""
        while True:
            weights = [round(self._random.uniform(0.05, 1), 2) for _ in ARRIVING]
            blend = self._rig.blend(ARRIVING, weights, method=method)
            if blend.key not in self._seen:
                self._seen.add(blend.key)
                return blend


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that at least `percent` of the values do not exceed."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(len(ranked) * percent / 100) - 1)]
