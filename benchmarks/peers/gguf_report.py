"""What the comparison with llama.cpp found: a table, the ratios that have goals, JSON."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from rich.console import Console

from .client import Run
from .gguf_engines import MIB, Held
from .report import table_of


@dataclass
class Measured:
    """Of one engine: seconds from its start to ready, what it held then, after one answer, and at the end;
    scenario -> its run, and the server's seconds of processor time in it, in every round."""

    ready_s: float = 0.0
    started: Held | None = None
    answered: Held | None = None
    ended: Held | None = None
    runs: dict[str, list[Run]] = field(default_factory=dict)
    cpu_s: dict[str, list[float]] = field(default_factory=dict)

    def add(self, scenario: str, run: Run, cpu_s: float) -> None:
        """One round's."""
        self.runs.setdefault(scenario, []).append(run)
        self.cpu_s.setdefault(scenario, []).append(cpu_s)

    def speeds(self, scenario: str) -> list[float]:
        """Tokens a second, by round."""
        return [run.tokens_per_second for run in self.runs[scenario]]

    def row(self, scenario: str) -> dict[str, float]:
        """Medians over the rounds; `cpu_ms` are of the server, a token."""
        summaries = [run.summary() for run in self.runs[scenario]]
        row = {key: statistics.median(one[key] for one in summaries) for key in summaries[0]}
        each = [
            1e3 * s / run.tokens for s, run in zip(self.cpu_s[scenario], self.runs[scenario], strict=True)
        ]
        return row | {"cpu_ms_a_token": statistics.median(each)}


class Goal(NamedTuple):
    """A ratio of tokens a second in a scenario, and what it should at least be."""

    of: str
    to: str
    scenario: str
    least: float


GOALS = (
    Goal("loramux", "llama.cpp", "1 x base", 0.9),
    Goal("loramux", "llama.cpp", "16 x base", 1.2),
    Goal("loramux", "llama.cpp", "16 x adapters", 3.0),
    Goal("loramux", "llama.cpp", "16 x blends", 3.0),
    Goal("loramux bfloat16", "loramux float32", "1 x base", 1.7),
    Goal("loramux", "loramux float32", "1 x base", 3.5),
)
MOST_MIB, MOST_READY_S = 600, 8.0

Found = Mapping[str, Measured]


class Ratio(NamedTuple):
    """A goal with the ratios of every round."""

    goal: Goal
    rounds: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


def ratios(found: Found) -> list[Ratio]:
    """Of every goal whose engines ran, taken within the rounds."""
    result = []
    for goal in GOALS:
        if {goal.of, goal.to} <= found.keys():
            of, to = (found[name].speeds(goal.scenario) for name in (goal.of, goal.to))
            result.append(Ratio(goal, [a / b for a, b in zip(of, to, strict=True)]))
    return result


def print_report(found: Found, checked: Mapping[str, str]) -> None:
    """For people."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    numbers = (
        "tokens/s",
        "lowest",
        "highest",
        "first token p50 ms",
        "inter-token p50 ms",
        "p99 ms",
        "cpu ms",
    )
    speeds = table_of("The pool that ships; cpu ms of the server a token", ("engine", "scenario"), numbers)
    for name, measured in found.items():
        for scenario in measured.runs:
            row, each = measured.row(scenario), measured.speeds(scenario)
            figures = [row["tokens_per_second"], min(each), max(each), *list(row.values())[1:]]
            speeds.add_row(name, scenario, *(f"{figure:.1f}" for figure in figures))
    console.print(speeds)
    goals = table_of("Goals", ("what",), ("median", "lowest", "highest", "goal"))
    for goal, rounds in ratios(found):
        middle = f"{statistics.median(rounds):.2f}"
        what = f"{goal.scenario}: {goal.of} / {goal.to}"
        goals.add_row(what, middle, f"{min(rounds):.2f}", f"{max(rounds):.2f}", f"{goal.least:g}")
    console.print(goals)
    states = table_of("Process", ("engine",), (
        "ready s", "cpu s", "resident MiB", "share", "after an answer", "share", "at the end", "share",
    ))  # fmt: skip
    for name, measured in found.items():
        held = [one for one in (measured.started, measured.answered, measured.ended) if one is not None]
        sizes = [f"{size / MIB:.0f}" for one in held for size in (one.resident, one.share)]
        cpu = f"{measured.started.cpu_s:.1f}" if measured.started is not None else ""
        states.add_row(name, f"{measured.ready_s:.1f}", cpu, *sizes)
    console.print(states)
    console.print(f"goals: loramux ready in {MOST_READY_S:g} s, {MOST_MIB} MiB after an answer")
    for name, text in checked.items():
        console.print(f"{name}: {text}", markup=False, soft_wrap=True)


def as_json(found: Found) -> dict[str, Any]:
    """The numbers."""
    return {
        "engines": {name: _of_one(measured) for name, measured in found.items()},
        "ratios": [
            {**ratio.goal._asdict(), "median": ratio.median, "rounds": list(ratio.rounds)}
            for ratio in ratios(found)
        ],
    }


def _of_one(measured: Measured) -> dict[str, Any]:
    states = {"started": measured.started, "answered": measured.answered, "ended": measured.ended}
    return {
        "ready_s": measured.ready_s,
        "held": {name: asdict(held) for name, held in states.items() if held is not None},
        "scenarios": {
            name: {**measured.row(name), "rounds": measured.speeds(name)} for name in measured.runs
        },
    }
