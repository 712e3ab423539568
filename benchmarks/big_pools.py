"""`python benchmarks/big_pools.py`: pools of 10 to 10,000 experts on the tests' base of 6.8 M parameters.

For each size: start, memory, routing with one and with 16 callers, `/v1/models` and `/metrics`, and the
throughput of 16 requests at a time with blends drawn by Zipf's law and uniformly, over experts of which only
some fit, as a share of the bare base's in the same run. Each size has a process of its own, so that memory is
its own. Before anything is timed, resident blends are compared with the sums of their experts. The last line
of stdout is one JSON object.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from loramux.adapters.blend import Blend
    from loramux.server.parts import Parts
    from tests.big_pool import BigPool

ROOT = Path(__file__).resolve().parents[1]
SIZES = (10, 100, 1_000, 10_000)
#: Room for this many experts of rank 2 on the device, so that larger pools have to change places.
ROOM = 256
CALLERS, REQUESTS, PROMPT, ANSWER, ROUNDS = 16, 96, 32, 32, 3
_ids = count()


def measure(size: int, folder: Path) -> dict[str, Any]:
    """One pool, in this process."""
    from loramux.server.build import build
    from loramux.server.settings import EngineSettings, ResidencySettings, Settings
    from tests.big_pool import write_big_pool

    started = time.perf_counter()
    pool = write_big_pool(folder, size)
    written = time.perf_counter() - started
    before = _memory()
    settings = Settings(
        pool=folder,
        device="cpu",
        engine=EngineSettings(kv_tokens=32768),
        residency=ResidencySettings(bytes=ROOM * 2 * 29184 * 4),
    )
    started, worked = time.perf_counter(), time.process_time()
    parts = build(settings)
    found: dict[str, Any] = {
        "experts": size,
        "write_s": round(written, 1),
        "build_s": round(time.perf_counter() - started, 2),
        "build_processor_s": round(time.process_time() - worked, 2),
        "memory_mib": {"before": before, "built": _memory()},
    }
    found |= asyncio.run(_serve(parts, pool))
    found["memory_mib"]["served"] = _memory()
    return found


async def _serve(parts: "Parts", pool: "BigPool") -> dict[str, Any]:
    import numpy as np

    generator = np.random.default_rng(0)
    await parts.engine.start()
    found: dict[str, Any] = {}
    try:
        await _check(parts, pool)
        for callers in (1, CALLERS):
            await _decide(parts, pool, generator, callers, 4)
            seconds = await _decide(parts, pool, generator, callers, 160 // callers + 20)
            found[f"route_ms_{callers}"] = {
                f"p{p}": round(1e3 * float(np.percentile(seconds, p)), 3) for p in (50, 95)
            }
        found["models_ms"], found["models_kib"] = _timed(lambda: json.dumps(parts.catalog.cards()))
        found["metrics_ms"], found["metrics_kib"] = _timed(lambda: parts.metrics.render().decode())
        found["traffic"] = await _traffic(parts, generator)
        stats = parts.residency.stats()
        found["residency"] = {
            "capacity_bytes": stats.capacity_bytes,
            "used_bytes": stats.used_bytes,
            "host_bytes": stats.host_bytes,
            "hits": stats.hits,
            "misses": stats.misses,
            "evictions": stats.evictions,
        }
        found["index"] = _indexes(parts, pool, generator)
    finally:
        await parts.engine.stop(5)
        await parts.router.close()
        parts.prompts.close()
    return found


async def _check(parts: "Parts", pool: "BigPool") -> None:
    """What is resident is what the experts' files say, at one module, after others had been in its rows."""
    import torch

    from loramux.adapters.blend import Blend

    names = list(pool.names)
    for start in (0, len(names) - 3, 0):
        chosen = names[start : start + 3]
        held = parts.residency.experts
        blend = Blend.of([(name, held[name].content_hash, 0.25) for name in chosen])
        async with parts.residency.lease(blend) as lease:
            assert lease.handle is not None
            slot: Any = lease.handle.slot
            arena = parts.residency._arena
            module = "model.layers.3.mlp.up_proj"
            rows = torch.cat([torch.arange(lo, hi) for lo, hi in slot.extents])
            served = (arena.b[module][rows].double() * slot.gate[:, None].double()).T @ arena.a[module][
                rows
            ].double()
            wanted = sum(0.25 * held[name].delta(module) for name in chosen)
            if not torch.allclose(served, wanted, atol=1e-5):
                raise SystemExit("the resident blend is not the sum of its experts")


async def _decide(
    parts: "Parts", pool: "BigPool", generator: "np.random.Generator", callers: int, rounds: int
) -> list[float]:
    """Seconds of decisions as a request has them: the router's, and what the server makes of it."""
    from loramux.server.ask import Ask, Prompt
    from loramux.server.engine.protocol import Sampling

    seconds: list[float] = []
    own = generator.integers(len(pool.names), size=callers * rounds)
    texts = [f"{pool.text(int(expert), generator)} {number}" for number, expert in enumerate(own)]

    async def caller(texts: Sequence[str]) -> None:
        for text in texts:
            ask = Ask("auto", (Prompt(text, (1,), 1),), text, Sampling(1))
            started = time.perf_counter()
            selection = await parts.selector.select(ask)
            parts.selector.blend(selection)
            seconds.append(time.perf_counter() - started)

    await asyncio.gather(*(caller(texts[n::callers]) for n in range(callers)))
    return seconds


async def _traffic(parts: "Parts", generator: "np.random.Generator") -> dict[str, Any]:
    """Tokens a second of closed loops; every round has each kind, in turns."""
    import numpy as np

    from loramux.adapters.blend import Blend

    names = list(parts.residency.experts)
    size = len(names)
    blends = 4 * size
    experts = np.stack([generator.choice(size, 3, replace=False) for _ in range(blends)])
    shares = np.arange(1, blends + 1, dtype=np.float64) ** -1.0
    shares /= shares.sum()

    def blend(number: int) -> "Blend":
        held = parts.residency.experts
        chosen = [names[expert] for expert in experts[number]]
        return Blend.of([(n, held[n].content_hash, w) for n, w in zip(chosen, (0.6, 0.3, 0.1), strict=True)])

    def drawn(kind: str) -> list["Blend"]:
        if kind == "base":
            return [Blend.bare()] * REQUESTS
        if kind == "one blend each, resident":
            return [blend(number % CALLERS) for number in range(REQUESTS)]
        return [
            blend(int(n)) for n in generator.choice(blends, REQUESTS, p=shares if kind == "zipf" else None)
        ]

    kinds = ("base", "one blend each, resident", "zipf", "uniform")
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    loop: dict[str, list[float]] = {kind: [] for kind in kinds}
    over = 0
    for turn in range(ROUNDS):
        for kind in kinds[:: -1 if turn % 2 else 1]:
            asked, worked = drawn(kind), time.thread_time()
            rate = await _loops(parts, asked)
            rates[kind].append(rate)
            loop[kind].append((time.thread_time() - worked) / REQUESTS)
            stats = parts.residency.stats()
            over += stats.used_bytes > stats.capacity_bytes
    middle = {kind: sorted(values)[len(values) // 2] for kind, values in rates.items()}
    return {
        "tokens_per_second": {kind: round(value, 1) for kind, value in middle.items()},
        "of_base": {kind: round(value / middle["base"], 3) for kind, value in middle.items()},
        "event_loop_ms_per_request": {kind: round(1e3 * min(values), 3) for kind, values in loop.items()},
        "over_the_byte_limit": over,
    }


async def _loops(parts: "Parts", blends: "Sequence[Blend]") -> float:
    from contextlib import aclosing

    from loramux.server.engine.protocol import Sampling, Work

    sampling = Sampling(ANSWER, temperature=0, ignore_eos=True)

    async def caller(own: "Sequence[Blend]") -> None:
        for blend in own:
            async with parts.residency.lease(blend) as lease:
                number = next(_ids)
                prompt = tuple((number * 7919 + place * 31) % 8000 + 10 for place in range(PROMPT))
                work = Work(f"b{number}", prompt, sampling, lease.handle)
                async with aclosing(parts.engine.run(work)) as events:
                    async for _ in events:
                        pass

    started = time.perf_counter()
    await asyncio.gather(*(caller(blends[n::CALLERS]) for n in range(CALLERS)))
    return len(blends) * ANSWER / (time.perf_counter() - started)


def _indexes(parts: "Parts", pool: "BigPool", generator: "np.random.Generator") -> dict[str, Any]:
    """One query's milliseconds: every similarity, as it is served, and the first three by FAISS's indexes; of
    those that approximate, the share of the exact first three that they find."""
    import faiss
    import numpy as np

    fitted = parts.router.router  # type: ignore[attr-defined]
    texts = [pool.text(int(expert), generator) for expert in generator.integers(len(pool.names), size=200)]
    queries = fitted.embed(texts).vectors
    rows = np.ascontiguousarray(fitted.state.centroids)
    size, dimension = rows.shape
    made: dict[str, Any] = {"flat": faiss.IndexFlatIP(dimension)}
    if size >= 1000:
        lists = int(4 * size**0.5)
        made["ivf"] = faiss.IndexIVFFlat(
            faiss.IndexFlatIP(dimension), dimension, lists, faiss.METRIC_INNER_PRODUCT
        )
        made["ivf"].train(rows)
        made["ivf"].nprobe = max(1, lists // 16)
        made["hnsw"] = faiss.IndexHNSWFlat(dimension, 32, faiss.METRIC_INNER_PRODUCT)
    found: dict[str, Any] = {"every similarity": {"ms": _query_ms(queries, fitted.similarities)}}
    exact: Any = None
    for name, index in made.items():
        index.add(rows)
        _, places = index.search(queries, min(3, size))
        exact = places if exact is None else exact
        shared = [len(set(a) & set(b)) / len(a) for a, b in zip(places.tolist(), exact.tolist(), strict=True)]
        found[name] = {
            "ms": _query_ms(queries, lambda row, index=index: index.search(row, min(3, size))),
            "recall": round(float(np.mean(shared)), 4),
        }
    return found


def _query_ms(queries: Any, search: Any) -> float:
    taken = []
    for row in range(len(queries)):
        started = time.perf_counter()
        search(queries[row : row + 1])
        taken.append(time.perf_counter() - started)
    return round(1e3 * sorted(taken)[len(taken) // 2], 4)


def _timed(work: Any) -> tuple[float, int]:
    """Milliseconds, and KiB of what it gives."""
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        text = work()
        taken.append(time.perf_counter() - started)
    return round(1e3 * min(taken), 2), len(text) // 1024


def _memory() -> int:
    """MiB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="benchmarks/big_pools.py", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the JSON there")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        with tempfile.TemporaryDirectory(prefix="loramux-pool-") as folder:
            print(json.dumps(measure(given.one, Path(folder) / "pool")))
        return
    from benchmarks import machine

    runs = []
    for size in given.sizes:
        done = subprocess.run(  # noqa: S603 - this file, once more
            [sys.executable, __file__, "--one", str(size)], check=True, capture_output=True, text=True
        )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{size} experts: {runs[-1]}", file=sys.stderr, flush=True)
    found = {
        "benchmark": "big pools",
        "room": ROOM,
        "machine": machine.facts(),
        "versions": machine.versions(),
        "runs": runs,
    }
    if given.save:
        given.save.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    import runpy

    add_package = runpy.run_path(str(ROOT / "benchmarks" / "run.py"))["add_package"]
    for package in ("benchmarks", "tests"):
        add_package(package)
    main()
