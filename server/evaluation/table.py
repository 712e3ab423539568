"""An evaluation on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from loramux.server.evaluation.result import Evaluation, Measure
from loramux.server.evaluation.routing import NO_EXPERT, RoutingTable
from loramux.server.evaluation.score import standard_error

SERVED = "hybrid"
TITLES: dict[Measure, str] = {
    "loss": "Nats per answer token",
    "exact": "Exact match",
    "acc": "Multiple choice, acc (likeliest choice)",
    "acc_norm": "Multiple choice, acc_norm (likeliest per byte)",
}


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Every table that the evaluation has numbers for."""
    for name, domain in sorted(evaluation.experts.items(), key=lambda item: item[1]):
        console.print(f"expert {name}: {domain}")
    _print_routing(evaluation, console)
    for measure in evaluation.measured:
        console.print(_scores(evaluation, measure))
    for system in evaluation.systems:
        share = evaluation.gain_share(system.name) if system.mixes else None
        if share is not None:
            console.print(f"{system.name}: {share:.1%} of the best single experts' gain over the base")


def columns(evaluation: Evaluation) -> list[str]:
    """Of the confusion table."""
    table = served(evaluation)
    found = sorted({column for row in table.counts.values() for column in row} | set(table.counts))
    return [column for column in found if column != NO_EXPERT] + [NO_EXPERT]


def served(evaluation: Evaluation) -> RoutingTable:
    """The table of the strategy that is served by default, or of the only one there is."""
    return evaluation.routing.get(SERVED) or next(iter(evaluation.routing.values()))


def _print_routing(evaluation: Evaluation, console: Console) -> None:
    table = served(evaluation)
    names = columns(evaluation)
    confusion = Table(title=f"First choice, {table.strategy}: rows are texts, columns the expert's domain")
    for heading in ("domain", *names, "right"):
        confusion.add_column(
            heading,
            justify="left" if heading == "domain" else "right",
            overflow="fold",
            min_width=max(map(len, table.counts)) if heading == "domain" else None,
        )
    for domain, row in table.counts.items():
        confusion.add_row(
            domain, *(str(row.get(name, 0) or "·") for name in names), f"{table.accuracy(domain):.1%}"
        )
    console.print(confusion)
    for name, found in evaluation.routing.items():
        parts = [f"{name}: right domain first {found.accuracy():.1%}"]
        if found.reliability is not None:
            parts.append(f"calibration error {found.reliability.ece:.3f}")
        if found.roc is not None:
            parts.append(
                f"foreign texts: AUC {found.roc.auc:.3f}, {found.roc.caught:.0%} fall back, and "
                f"{found.roc.lost:.1%} of the own"
            )
        console.print("; ".join(parts))


def _scores(evaluation: Evaluation, measure: Measure) -> Table:
    """Domains down, systems across; single experts as the best of them."""
    systems = [system for system in evaluation.systems if system.kind != "expert"]
    has_experts = len(systems) < len(evaluation.systems)
    table = Table(title=TITLES[measure])
    table.add_column("domain", min_width=max(map(len, evaluation.domains)))
    table.add_column("rows", justify="right")
    for system in systems:
        table.add_column(system.name, justify="right", overflow="fold")
    if has_experts:
        table.add_column("best expert", justify="right")
        table.add_column("its id")
    for domain in evaluation.domains:
        values = [evaluation.value(system.name, domain, measure) for system in systems]
        best = evaluation.oracle(domain, measure)
        if best is None and not any(value is not None for value in values):
            continue
        score = next(row[domain] for row in evaluation.scores.values() if domain in row)
        rows = score.exact_rows if measure == "exact" else score.rows
        cells = [number(value, measure, rows) for value in values]
        if has_experts:
            cells += [number(None if best is None else best[1], measure, rows), best[0] if best else "-"]
        table.add_row(domain, str(rows), *cells)
    return table


def number(value: float | None, measure: Measure, rows: int) -> str:
    """A cell: a loss, or a share with its standard error."""
    if value is None:
        return "-"
    if measure == "loss":
        return f"{value:.3f}"
    return f"{value:.1%} ±{standard_error(value, rows):.1%}"
