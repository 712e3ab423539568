"""What a scenario found: lines with a median and the range of the repeats, as a table and as JSON."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Goal:
    """A limit that a line should keep."""

    limit: float
    at_least: bool

    def met(self, value: float) -> bool:
        """Whether `value` keeps it."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


def at_least(limit: float) -> Goal:
    """Not below `limit`."""
    return Goal(limit, True)


def at_most(limit: float) -> Goal:
    """Not above `limit`."""
    return Goal(limit, False)


@dataclass(frozen=True)
class Line:
    """One number: the median of `values`, one of which comes from each repeat."""

    what: str
    values: tuple[float, ...]
    unit: str
    goal: Goal | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def json(self) -> dict[str, Any]:
        """Plain JSON types."""
        found: dict[str, Any] = {"median": self.median, "unit": self.unit}
        if len(self.values) > 1:
            found |= {"low": min(self.values), "high": max(self.values), "repeats": len(self.values)}
        if self.goal is not None:
            found |= {"goal": str(self.goal), "met": self.goal.met(self.median)}
        return found


@dataclass
class Result:
    """The lines of a scenario in the order they should be read, and facts that have no unit."""

    lines: list[Line] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, what: str, values: Sequence[float] | float, unit: str, goal: Goal | None = None) -> None:
        """One more line; a single number counts as one repeat."""
        several = (values,) if isinstance(values, int | float) else tuple(values)
        self.lines.append(Line(what, several, unit, goal))

    def json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"lines": {line.what: line.json() for line in self.lines}, "facts": self.facts}


def ratios(values: Sequence[float], against: Sequence[float]) -> list[float]:
    """Neighbours divided: the value of each repeat by the other one of the same repeat."""
    return [value / other for value, other in zip(values, against, strict=True)]


def table(results: Mapping[str, Result]) -> Table:
    """Every line of every scenario."""
    made = Table(title="Benchmarks: medians, and the range of the repeats")
    for heading in ("scenario", "what", "median", "low", "high", "unit", "goal", ""):
        made.add_column(heading, justify="right" if heading in ("median", "low", "high", "goal") else "left")
    for name, result in results.items():
        for number, line in enumerate(result.lines):
            several = len(line.values) > 1
            made.add_row(
                name if number == 0 else "",
                line.what,
                short(line.median),
                short(min(line.values)) if several else "",
                short(max(line.values)) if several else "",
                line.unit,
                "" if line.goal is None else str(line.goal),
                "" if line.goal is None else ("met" if line.goal.met(line.median) else "missed"),
            )
        made.add_section()
    return made


def short(value: float) -> str:
    """Three digits that matter, and whole numbers whole."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 3 - len(str(int(abs(value)))))}f}" if abs(value) >= 1 else f"{value:.3f}"
