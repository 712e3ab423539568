"""The short form of an analysis, for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from loramux.adapters.importance.statistics import top_overlap
from loramux.server.importance.result import Analysis, System, off_diagonal


def print_analysis(analysis: Analysis, console: Console | None = None) -> None:
    """A line a system, and what its columns are."""
    console = console or Console()
    table = Table()
    table.add_column("system", no_wrap=True)
    for heading in ("kind", "loss", "rank : features", "tasks", "ranks < 0", "effective", "overlap"):
        table.add_column(heading, justify="right")
    for system in analysis.systems:
        table.add_row(system.name, system.kind, *_numbers(system))
    console.print(table)
    console.print(
        "rank : features: variance of the importance along the ranks over that along the features; tasks: "
        "correlation of two tasks; ranks < 0: pairs of ranks that correlate negatively; effective: ranks "
        "that matter; overlap: of two tasks' top tenth of ranks (chance: 0.05)"
    )


def _numbers(system: System) -> list[str]:
    variances = system.variances().values()
    features = sum(one.features for one in variances)
    ratio = sum(one.rank for one in variances) / features if features else 0.0
    between = [off_diagonal(matrix) for matrix in system.between_tasks().values()]
    ranks = [off_diagonal(matrix) for matrix in system.between_ranks().values() if len(matrix) > 1]
    overlap = top_overlap(system.shares())
    several = len(system.tasks) > 1
    effective = [one.effective for one in system.concentrations().values()]
    return [
        f"{sum(task.loss for task in system.tasks.values()) / len(system.tasks):.3f}",
        f"{ratio:.2f}",
        f"{sum(float(one.mean()) for one in between) / len(between):.2f}" if several else "-",
        f"{sum(float((one < 0).double().mean()) for one in ranks) / len(ranks):.0%}"
        if several and ranks
        else "-",
        f"{sum(effective) / len(effective):.0%}",
        "-" if overlap is None else f"{overlap:.2f}",
    ]
