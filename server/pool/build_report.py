"""What a build made: cluster sizes, their terms, and each expert against the base on rows it never saw."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from loramux.server.pool.manifest import Pool, PoolError

if TYPE_CHECKING:
    from rich.console import Console

REPORT = "report.json"


@dataclass(frozen=True, slots=True)
class ExpertLine:
    """One expert. Losses are nats per answer token on its cluster's held-out rows, None where there are none.

    `routed` is the share of those rows whose first choice (hybrid) is this expert.
    """

    id: str
    rows: int
    held_out_rows: int
    top_terms: tuple[str, ...]
    steps: int
    base_loss: float | None
    expert_loss: float | None
    routed: float | None


@dataclass(frozen=True, slots=True)
class BuildReport:
    """The report of a build; `routed` is over the held-out rows of all clusters."""

    rows: int
    held_out_rows: int
    cohesion: float
    routed: float | None
    experts: tuple[ExpertLine, ...]

    @property
    def not_better(self) -> list[str]:
        """Ids of experts that do not beat the base on held-out rows of their own cluster."""
        return [
            line.id
            for line in self.experts
            if line.base_loss is not None
            and line.expert_loss is not None
            and line.expert_loss >= line.base_loss
        ]


@dataclass(frozen=True, slots=True)
class ReadLine:
    """What is read back of an expert's line, whatever else it says; in the units of `ExpertLine`."""

    id: str
    held_out_rows: int | None = None
    base_loss: float | None = None
    expert_loss: float | None = None
    routed: float | None = None

    @property
    def gain(self) -> float | None:
        """How much less than the base it loses, in nats per answer token; None where one was not measured."""
        if self.base_loss is None or self.expert_loss is None:
            return None
        return self.base_loss - self.expert_loss


@dataclass(frozen=True, slots=True)
class _Lines:
    experts: tuple[ReadLine, ...]


_LINES = TypeAdapter(_Lines)


def write_report(report: BuildReport, folder: Path) -> None:
    """Write `report.json` into a folder."""
    (folder / REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")


def read_lines(pool: Pool) -> dict[str, ReadLine]:
    """What a pool's report says of its experts, by id; nothing where there is no report.

    Raises:
        PoolError: `report.json` is not what a build writes.
    """
    file = pool.root / REPORT
    try:
        lines = _LINES.validate_json(file.read_bytes()).experts
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as error:
        raise PoolError(f"{file}: {str(error).splitlines()[0]}; build the pool again or delete it") from None
    return {line.id: line for line in lines}


def print_report(report: BuildReport, console: Console | None = None) -> None:
    """Print the report as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report.rows} rows, {report.held_out_rows} held out", title_justify="left")
    table.add_column("expert", no_wrap=True)
    for heading in ("rows", "base loss", "expert loss", "change", "routed"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("top terms")
    for line in report.experts:
        base, expert = line.base_loss, line.expert_loss
        change = f"{expert / base - 1:+.1%}" if base and expert is not None else "-"
        table.add_row(
            line.id,
            str(line.rows),
            _number(base),
            _number(expert),
            change,
            "-" if line.routed is None else f"{line.routed:.0%}",
            " ".join(line.top_terms),
        )
    console = console or Console()
    console.print(table)
    console.print("losses: nats per answer token on held-out rows of the expert's own cluster", style="dim")
    if report.routed is not None:
        console.print(f"routed to their own cluster's expert: {report.routed:.1%} of the held-out rows")
    if report.not_better:
        console.print(
            f"no better than the base: {', '.join(report.not_better)}; train these longer", style="red"
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
