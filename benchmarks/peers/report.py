"""What a comparison found, as tables and as JSON."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .client import Run
from .merging import MERGED

# engine -> scenario -> its run in every round
Runs = dict[str, dict[str, list[Run]]]


@dataclass
class Result:
    """Everything found in one dtype; `absent` and `failed` say why an engine is missing."""

    absent: dict[str, str]
    failed: dict[str, str] = field(default_factory=dict)
    checked: dict[str, Any] = field(default_factory=dict)
    runs: Runs = field(default_factory=dict)
    merges: dict[str, Any] = field(default_factory=dict)


def rows(runs: Runs) -> list[dict[str, Any]]:
    """One row an engine and scenario: medians, and ratios of tokens a second, taken within each round.

    `of_own_base`: of the base scenario of the same server; `of_base_without_lora`: of the same engine started
    without LoRA; `loramux_times_faster`: loramux in the same scenario, `loramux_blends_times_faster`: with
    8 blends, over this row.
    """
    found: list[dict[str, Any]] = []
    for name, scenarios in runs.items():
        for scenario, measured in scenarios.items():
            summaries = [run.summary() for run in measured]
            row: dict[str, Any] = {"engine": name, "scenario": scenario}
            row |= {key: statistics.median(s[key] for s in summaries) for key in summaries[0]}
            row["of_own_base"] = _ratio(measured, scenarios["base"])
            plain = runs.get(f"{name} without lora", {}).get("base")
            row["of_base_without_lora"] = _ratio(measured, plain) if plain else None
            ours = runs["loramux"][scenario]
            row["loramux_times_faster"] = _ratio(ours, measured)
            blends = runs["loramux"]["8 blends"] if scenario == "8 adapters" else None
            row["loramux_blends_times_faster"] = _ratio(blends, measured) if blends else None
            found.append(row)
    return found


def _ratio(of: Sequence[Run], to: Sequence[Run]) -> float:
    return statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in zip(of, to, strict=True))


def print_tables(results: dict[str, Result]) -> None:
    """For people."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = table_of(
        "Serving on a CPU", ("engine", "dtype", "scenario"),
        ("tokens/s", "of own base", "of lora off", "loramux ×", "loramux's blends ×",
         "first token p50 ms", "inter-token p50 ms", "inter-token p99 ms"),
    )  # fmt: skip
    merges = table_of(
        "Three experts into one", ("method", "dtype"), ("loramux ms", "peft ms", "times faster")
    )
    for dtype, result in results.items():
        for row in rows(result.runs):
            off = row["of_base_without_lora"]
            ratios = [
                row["of_own_base"],
                off,
                row["loramux_times_faster"],
                row["loramux_blends_times_faster"],
            ]
            shown = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
            latencies = [f"{row[key]:.0f}" for key in row if key.endswith("_ms")]
            speed = f"{row['tokens_per_second']:.1f}"
            table.add_row(row["engine"], dtype, row["scenario"], speed, *shown, *latencies)
        for method, row in result.merges.items():
            numbers = (f"{row['loramux_ms']:.1f}", f"{row['peft_ms']:.0f}", f"{row['times_faster']:.1f}")
            merges.add_row(f"{method} / {MERGED[method]}", dtype, *numbers)
    console.print(table)
    if merges.row_count:
        console.print(merges)
    for dtype, result in results.items():
        for name, reason in {**result.absent, **result.failed}.items():
            console.print(f"{name}, {dtype}: {reason}", markup=False, soft_wrap=True)


def table_of(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title)
    for heading in texts:
        table.add_column(heading)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def machine() -> dict[str, Any]:
    """CPU model and the flags that decide what code runs, cores, memory."""
    model, flags = platform.machine(), set[str]()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() == "flags":
            flags = set(value.split())
    telling = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": model,
        "flags": [f for f in telling if f in flags],
        "memory_gib": round(memory, 1),
    }


def as_json(result: Result) -> dict[str, Any]:
    """The numbers of one dtype."""
    return {
        "rows": rows(result.runs),
        "merges": result.merges,
        "checked": result.checked,
        "absent": result.absent,
        "failed": result.failed,
    }
