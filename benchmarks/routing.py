"""The router of the demo pool: how often its blends repeat, and how long a request waits for it."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from itertools import count

from benchmarks.bench import Bench
from benchmarks.latency import percentile
from benchmarks.prompts import stream
from benchmarks.report import Result, at_most
from loramux.adapters.blend import Blend
from loramux.router.decision import Decision, RoutingOptions
from loramux.server.ask import Ask, Prompt
from loramux.server.build import build, load_pool_router, open_pool
from loramux.server.engine.protocol import Sampling, Token, Work
from loramux.server.parts import Parts
from loramux.server.settings import EngineSettings, Settings
from tests.kit import DEMO_POOL

GRIDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25)
PROMPTS = 2000
SOFTER = 5.0
CALLERS = 16
ROUNDS = 40


async def cache_hits(bench: Bench) -> Result:
    """Blends that were made before, of 2,000 different prompts; nothing random, so there is no range."""
    settings = Settings(pool=DEMO_POOL)
    pool = open_pool(settings)
    router = load_pool_router(settings, pool)
    texts = stream(PROMPTS)
    calibrated = router.resolve().temperature
    result = Result(facts={"prompts": PROMPTS, "calibrated temperature": calibrated})
    for name, temperature in (("calibrated", calibrated), (f"{SOFTER:g} x softer", SOFTER * calibrated)):
        bench.progress(f"{name} temperature")
        decisions = router.decide(texts, RoutingOptions(temperature=temperature))
        share = Counter(len(decision.experts) for decision in decisions)
        result.facts[f"{name}: prompts by experts chosen"] = {str(n): share[n] for n in sorted(share)}
        for grid in GRIDS:
            keys = [on_grid(decision, grid).key for decision in decisions]
            hits = 1 - len(set(keys)) / len(keys)
            result.add(f"{name} temperature, grid {grid:g}: hits", hits, "ratio")
    return result


def on_grid(decision: Decision, grid: float) -> Blend:
    """The blend the server makes of a decision; here an expert's name stands for its content."""
    return Blend.of([(expert.id, expert.id, expert.weight) for expert in decision.experts], grid=grid)


async def route(bench: Bench) -> Result:
    """Milliseconds of a decision with 16 callers, each text new, and its share of the time to first token."""
    bench.progress("loading the demo pool")
    parts = build(Settings(pool=DEMO_POOL, device="cpu", engine=EngineSettings(kv_tokens=32768)))
    texts = iter(stream((2 * CALLERS * ROUNDS + 2 * CALLERS) * bench.repeats + CALLERS * ROUNDS))
    await parts.engine.start()
    result = Result()
    try:
        await _decide(parts, [next(texts) for _ in range(CALLERS * ROUNDS)])
        for name, load in (("idle", 0), ("under load", 16)):
            seconds: list[list[float]] = []
            shares: list[float] = []
            async with decoding(parts, load):
                for repeat in range(bench.repeats):
                    bench.progress(f"{name}, {repeat + 1} of {bench.repeats}")
                    seconds.append(await _decide(parts, [next(texts) for _ in range(CALLERS * ROUNDS)]))
                    waits = await asyncio.gather(*(first_token(parts, next(texts)) for _ in range(CALLERS)))
                    shares.append(percentile([wait.share for wait in waits], 50))
            for percent in (50, 95):
                goal = at_most(5.0) if (name, percent) == ("idle", 95) else None
                values = [1e3 * percentile(each, percent) for each in seconds]
                result.add(f"{name}, {CALLERS} callers: p{percent}", values, "ms", goal)
            result.add(f"{name}: share of time to first token", shares, "ratio")
    finally:
        await parts.engine.stop(5)
        await parts.router.close()
        parts.prompts.close()
    return result


async def _decide(parts: Parts, texts: Sequence[str]) -> list[float]:
    """Seconds of every decision when 16 callers ask one after another."""
    seconds: list[float] = []

    async def caller(own: Sequence[str]) -> None:
        for text in own:
            started = time.perf_counter()
            await parts.router.decide(text, RoutingOptions())
            seconds.append(time.perf_counter() - started)

    await asyncio.gather(*(caller(texts[n::CALLERS]) for n in range(CALLERS)))
    return seconds


@dataclass(frozen=True)
class Wait:
    """Seconds until a request was routed, and until its first token came."""

    routed: float
    token: float

    @property
    def share(self) -> float:
        return self.routed / self.token


_ids = count()


async def first_token(parts: Parts, text: str) -> Wait:
    """One request through the server's steps, up to its first token."""
    tokens = await parts.prompts.text(text)
    sampling = Sampling(1, temperature=0, ignore_eos=True)
    ask = Ask("auto", (Prompt(text, tokens, 1),), text, sampling)
    started = time.perf_counter()
    selection = await parts.selector.select(ask)
    routed = time.perf_counter()
    async with parts.residency.lease(parts.selector.blend(selection)) as lease:
        work = Work(f"t{next(_ids)}", tokens, sampling, lease.handle)
        async with aclosing(parts.engine.run(work)) as events:
            async for event in events:
                if isinstance(event, Token):
                    break
    return Wait(routed - started, time.perf_counter() - started)


@asynccontextmanager
async def decoding(parts: Parts, requests: int) -> AsyncIterator[None]:
    """`requests` sequences of the bare base that decode all the time."""

    async def forever() -> None:
        while True:
            sampling = Sampling(1024, temperature=0, ignore_eos=True)
            work = Work(f"l{next(_ids)}", tuple(range(10, 26)), sampling)
            async with aclosing(parts.engine.run(work)) as events:
                async for _ in events:
                    pass

    tasks = [asyncio.create_task(forever()) for _ in range(requests)]
    try:
        while parts.engine.stats().running < requests:
            await asyncio.sleep(0.01)
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
