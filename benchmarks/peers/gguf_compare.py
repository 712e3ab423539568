"""loramux beside llama.cpp on the pool that ships: the same GGUF file, the same experts, the same prompts.

    benchmarks/peers/setup.sh llama.cpp
    python benchmarks/peers/run.py gguf [--repeats N] [--tokens N] [--save FILE]

Scenarios: 1 and 16 streaming completions at once, of 64 greedy tokens after prompts of 32, on the base, over
8 adapters, and over 8 blends of two. loramux stands here three times: as shipped, with the file's blocks; in
float32, the numbers that the blocks stand for; and on a checkpoint in bfloat16. The latter two answer one
request on the base, which is what their lines are about.

What to know when reading the numbers:
- Engines are started one after another while the others wait, so that the time to ready is theirs. All live
  at once, and those that wait use under 1 % of a core. A round runs every engine once, the next round in the
  opposite order; ratios are taken within a round.
- Everybody computes with as many threads as there are cores, and the client shares them.
- llama.cpp's ggml is compiled for this processor; what it says it has is in the result. It has 16 slots of
  256 tokens, its batch sizes are its own defaults, and its adapters are float32, as its converter makes them.
- llama.cpp multiplies 4-bit blocks with activations rounded to 8 bits, loramux with float32.
- Memory is read once after the start and once after all rounds: resident bytes of the process, and its share
  of them (pages of files that two processes map count half in each).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from .checks import WrongAnswerError
from .client import AnswerError, Run
from .engines import CORES, PeerFailedError
from .files import DEFAULT_CACHE
from .gguf_checks import compare_answers
from .gguf_engines import GgufServer, LlamaCpp, LoramuxGguf
from .gguf_files import GgufFiles, make_gguf_files, natural_prompts
from .gguf_report import Measured, as_json, print_report
from .report import machine

ALL = tuple((requests, kind) for requests in (1, 16) for kind in ("base", "adapters", "blends"))
ONE = ((1, "base"),)


class GgufComparison:
    """Everything that is measured."""

    def __init__(self, engines: list[GgufServer], files: GgufFiles, arguments: argparse.Namespace) -> None:
        self.engines = engines
        self.files = files
        self.arguments = arguments
        self.found = {engine.label: Measured() for engine in engines}
        self.checked: dict[str, str] = {}
        self._tokenizer = files.tokenizer()
        self._seeds = count()

    async def measure(self) -> None:
        """Start all, compare answers, time all, stop all.

        Raises:
            WrongAnswerError, PeerFailedError, AnswerError: nothing is worth timing, or something broke.
        """
        try:
            for engine in self.engines:
                await engine.start()
                found = self.found[engine.label]
                found.ready_s, found.started = engine.ready_s, engine.started
                await self._time(engine, 1, "base", 4)
                found.answered = engine.held()
                self._say(f"{engine.label}: ready in {engine.ready_s:.1f} s")
            await self._check()
            for engine in self.engines:
                for requests, kind in self._scenarios(engine):
                    await self._time(engine, requests, kind, 4)
            for number in range(self.arguments.repeats):
                for engine in self.engines[:: -1 if number % 2 else 1]:
                    for requests, kind in self._scenarios(engine):
                        run, cpu_s = await self._time(engine, requests, kind, self.arguments.tokens)
                        name = f"{requests} x {kind}"
                        self.found[engine.label].add(name, run, cpu_s)
                        speed = f"{run.tokens_per_second:.1f} tokens/s"
                        self._say(f"round {number}: {engine.label}, {name}: {speed}")
            for engine in self.engines:
                self.found[engine.label].ended = engine.held()
        finally:
            for engine in self.engines:
                engine.stop()

    async def _check(self) -> None:
        ours = next(engine for engine in self.engines if engine.label == "loramux")
        theirs = next((engine for engine in self.engines if isinstance(engine, LlamaCpp)), None)
        if theirs is not None:
            self.checked = await compare_answers(ours, theirs)
            self.checked["processor"] = theirs.features()
        for name, text in self.checked.items():
            self._say(f"{name}: {text}")

    @staticmethod
    def _scenarios(engine: GgufServer) -> tuple[tuple[int, str], ...]:
        return ALL if engine.label in ("loramux", "llama.cpp") else ONE

    async def _time(self, engine: GgufServer, requests: int, kind: str, tokens: int) -> tuple[Run, float]:
        """One run with prompts that were not there before, and the processor time of the server."""
        asked = natural_prompts(self._tokenizer, requests, next(self._seeds))
        before = engine.held().cpu_s
        run = await engine.run(asked, self.files.mixtures(kind, requests), tokens)
        return run, engine.held().cpu_s - before

    @staticmethod
    def _say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def main(given: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, prog="run.py gguf", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = ("file", "float32", "bfloat16")
    parser.add_argument("--weights", nargs="+", choices=kinds, default=kinds, help="of loramux")
    parser.add_argument("--alone", action="store_true", help="without llama.cpp")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="venvs, model files, logs")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args(given)
    # Asked to end, it must still stop what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM; nothing is reported"))
    disable_progress_bar()
    sources = None if arguments.alone else LlamaCpp.sources_in(arguments.cache)
    if sources is not None and not (sources.parent / ".peer-installed").is_file():
        raise SystemExit(
            "llama.cpp is not installed: run benchmarks/peers/setup.sh llama.cpp, or give --alone"
        )
    files = make_gguf_files(arguments.cache, sources)
    engines: list[GgufServer] = [
        LoramuxGguf(files, arguments.cache, dtype) for dtype in dict.fromkeys(("file", *arguments.weights))
    ]
    if sources is not None:
        engines.insert(1, LlamaCpp(files, arguments.cache, "file"))
    comparison = GgufComparison(engines, files, arguments)
    versions = {engine.name: engine.versions() for engine in engines}
    try:
        asyncio.run(comparison.measure())
    except (PeerFailedError, AnswerError, WrongAnswerError) as error:
        raise SystemExit(f"{error}; nothing was compared") from None
    print_report(comparison.found, comparison.checked)
    result: dict[str, Any] = {
        "benchmark": "gguf", "model": files.gguf.name, "answer_tokens": arguments.tokens,
        "repeats": arguments.repeats, "machine": {**machine(), "cores": CORES}, "versions": versions,
        "checked": comparison.checked, **as_json(comparison.found),
    }  # fmt: skip
    if arguments.save:
        arguments.save.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
