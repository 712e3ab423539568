"""`python benchmarks/invariance.py`: what `engine.batch_invariant` costs, as throughput with it over without.

`--pool DIR` (the tests' by default), `--dtype float32 | auto`, `--rounds 9`. Both engines' runners in one
process and on one thread, in turns, by that thread's processor time.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Tokens before the first decode step, and how many steps are taken.
BEFORE, STEPS = 100, 12


def main(pool: Path, dtype: str, rounds: int) -> dict[str, object]:
    import torch

    from benchmarks.machine import facts, versions
    from loramux.server.build import build_core
    from loramux.server.engine.protocol import Sampling, Work
    from loramux.server.engine.runner import Runner
    from loramux.server.engine.scheduler import Chunk
    from loramux.server.engine.sequence import Sequence
    from loramux.server.pool.routing import open_pool
    from loramux.server.settings import Settings
    from tests.tiny import NOWHERE

    torch.set_num_threads(1)

    def runner(invariant: bool) -> tuple[Runner, int]:
        engine = {"batch_invariant": invariant, "kv_tokens": 8192}
        settings = Settings(pool=pool, device="cpu", dtype=dtype, verify_pool=False, engine=engine)
        core = build_core(settings, open_pool(settings))
        core.engine._runner.start()
        return core.engine._runner, core.width

    (without, width), (with_it, _) = runner(False), runner(True)

    def sequences(count: int, length: int) -> list[Sequence]:
        pages, made = -(-length // 32), []
        for number in range(count):
            tokens = tuple(torch.randint(width, (length,)).tolist())
            one = Sequence(Work(str(number), tokens, Sampling(max_tokens=1)), frozenset(), NOWHERE)
            one.pages = list(range(number * pages, (number + 1) * pages))
            made.append(one)
        return made

    def prompt(runner: Runner, length: int) -> float:
        [one] = sequences(1, length)
        began = time.thread_time()
        runner.run([Chunk(one, 0, length)], lambda: None)
        return time.thread_time() - began

    def decode(runner: Runner, count: int) -> float:
        some = sequences(count, BEFORE + STEPS + 1)
        for one in some:
            runner.run([Chunk(one, 0, BEFORE)], lambda: None)
        began = time.thread_time()
        for step in range(STEPS):
            runner.run([Chunk(one, BEFORE + step, 1) for one in some], lambda: None)
        return (time.thread_time() - began) / STEPS

    found: dict[str, object] = {"machine": facts(), "versions": versions(), "pool": pool.name, "dtype": dtype}
    work: tuple[tuple[str, Callable[[Runner, int], float], tuple[int, ...]], ...] = (
        ("prompt", prompt, (64, 256, 512)),
        ("decode", decode, (1, 4, 16)),
    )
    for name, measure, sizes in work:
        for size in sizes:
            ratios = []
            for turn in range(rounds):
                pair = {one: measure(one, size) for one in (without, with_it)[:: -1 if turn % 2 else 1]}
                ratios.append(pair[without] / pair[with_it])
            found[f"{name} {size}"] = {
                "median": statistics.median(ratios), "low": min(ratios), "high": max(ratios),
            }  # fmt: skip
    return found


if __name__ == "__main__":
    sys.path[0] = str(ROOT / "benchmarks")
    from run import add_package

    for package in ("benchmarks", "tests"):
        add_package(package)
    sys.path.pop(0)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pool", type=Path, default=ROOT / "tests" / "demo_pool")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    print(json.dumps(main(arguments.pool, arguments.dtype, arguments.rounds), indent=1))
