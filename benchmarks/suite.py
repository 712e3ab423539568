"""Every scenario by name, and the command that runs them: `python benchmarks/run.py --help`."""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils.logging import disable_progress_bar

from benchmarks import (
    decode,
    footprint,
    gpu,
    latency,
    machine,
    merge,
    plot,
    routing,
    sparse,
    steps,
    strategies,
    weights,
)
from benchmarks.bench import Bench
from benchmarks.report import Result, table
from benchmarks.shapes import SHAPES


class Scenario(NamedTuple):
    """What runs it, and on which device it is part of the suite."""

    run: Callable[[Bench], Awaitable[Result]]
    device: str = "cpu"


SCENARIOS = {
    "cold_start": Scenario(footprint.cold_start),
    "route": Scenario(routing.route),
    "cache_hits": Scenario(routing.cache_hits),
    "merge": Scenario(merge.merges),
    "decode": Scenario(decode.decode),
    "traffic": Scenario(decode.traffic),
    "prefill": Scenario(decode.prefill),
    "base_only": Scenario(decode.base_only),
    "first_token": Scenario(latency.first_token),
    "streams": Scenario(latency.streams),
    "memory": Scenario(footprint.memory),
    "floor": Scenario(footprint.floor),
    "mixlora": Scenario(sparse.mixlora_ffn),
    "loracoe": Scenario(sparse.loracoe_gate),
    "strategies": Scenario(strategies.strategies),
    "weights": Scenario(weights.weights),
    "steps": Scenario(steps.steps, "cuda"),
    "gated_lora": Scenario(gpu.gated_lora, "cuda"),
    "decode_nf4": Scenario(gpu.decode_nf4, "cuda"),
    "merge_cuda": Scenario(gpu.merge_exact, "cuda"),
}


async def run(names: Sequence[str], shape: str, repeats: int, device: str) -> dict[str, Any]:
    """Run scenarios in order, with a bar on stderr and the table on stdout at the end.

    Returns:
        What the JSON line holds.

    Raises:
        Wrong: something computes the wrong thing, so nothing of that scenario was timed.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.fields[about]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results: dict[str, Result] = {}
    seconds: dict[str, float] = {}
    with Progress(*columns, console=console, redirect_stdout=False) as progress:
        task = progress.add_task("benchmarks", total=len(names), about="")
        async with AsyncExitStack() as stack:

            def tell(text: str) -> None:
                progress.update(task, about=f"{name}: {text}")

            bench = Bench(SHAPES[shape], repeats, stack, tell, device)
            for name in names:
                tell("")
                started = time.perf_counter()
                results[name] = await SCENARIOS[name].run(bench)
                seconds[name] = time.perf_counter() - started
                progress.advance(task)
                console.print(f"{name}: {seconds[name]:.0f} s", highlight=False)
    Console(width=None if sys.stdout.isatty() else 140).print(table(results))
    return {
        "benchmark": "loramux",
        "shape": shape,
        "device": device,
        "repeats": repeats,
        "machine": machine.facts(),
        "versions": machine.versions(),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "scenarios": {name: result.json() for name, result in results.items()},
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, help="default: 0.39b on a CPU, 7b on CUDA")
    parser.add_argument("--only", action="append", choices=SCENARIOS, help="repeatable; default: all")
    parser.add_argument("--repeats", type=int, default=3, help="values a median is taken of")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the JSON line and the plot there")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    names = [name for name, scenario in SCENARIOS.items() if scenario.device == arguments.device]
    if wrong := [name for name in arguments.only or () if name not in names]:
        parser.error(f"{', '.join(wrong)}: not part of the suite for {arguments.device}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("skipped: torch sees no CUDA GPU here", file=sys.stderr)
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    disable_progress_bar()
    shape = arguments.shape or ("7b" if arguments.device == "cuda" else "0.39b")
    chosen = [name for name in names if not arguments.only or name in arguments.only]
    found = asyncio.run(run(chosen, shape, arguments.repeats, arguments.device))
    line = json.dumps(found)
    if arguments.save:
        save(found, arguments.save)
    print(line)


def save(found: dict[str, Any], folder: Path) -> None:
    """`<device>-<shape>.json`, and beside it the plot if decoding was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{found['device']}-{found['shape']}"
    (folder / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n")
    drawing = plot.decode_ratios(found)
    if drawing is not None:
        (folder / f"{stem}.svg").write_text(drawing)
