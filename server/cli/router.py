"""`loramux router`: fit a pool's router again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loramux.router.encoder_place import DEFAULT_ENCODER
from loramux.server.cli.commands import help_without_command
from loramux.server.cli.rows import Rows

if TYPE_CHECKING:
    from rich.console import Console

    from loramux.server.pool.refit import RefitReport

app = typer.Typer(
    help="Fit a pool's router again.\n\nExample: loramux router fit my-pool --data corpus",
    add_completion=False,
    rich_markup_mode=None,
    callback=help_without_command,
    invoke_without_command=True,
)

LEARNED = "learned"


@app.command()
def fit(
    pool: Annotated[Path, typer.Argument(help="Pool directory.")],
    data: Rows,
    classifier: Annotated[
        str,
        typer.Option(
            help="discriminant, ridge, logistic, or transformer (fine-tuned); `best`: the one of the first "
            "three with the least held-out loss."
        ),
    ] = "best",
    transformer: Annotated[
        str,
        typer.Option(
            help="What `--classifier transformer` fine-tunes: a directory, a package, a cached hub id."
        ),
    ] = DEFAULT_ENCODER,
    epochs: Annotated[float, typer.Option(min=0.01, help="Of the transformer.")] = 4.0,
    rate: Annotated[float, typer.Option(min=1e-9, help="Peak learning rate of the transformer.")] = 5e-5,
    hybrid_weight: Annotated[
        str, typer.Option(help="The cosine's share in `hybrid`, from 0 to 1; `learned` fits it.")
    ] = LEARNED,
    rejected: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of held-out texts that the threshold may lose.")
    ] = 0.03,
    false_routing: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=0.99,
            help="Share of foreign texts that the threshold may let through; replaces --rejected.",
        ),
    ] = None,
    foreign: Annotated[
        list[Path] | None,
        typer.Option(
            help="Rows that no expert is for; unset: every held-out row is one to all experts but its own."
        ),
    ] = None,
    labels: Annotated[
        str,
        typer.Option(
            help="domain: a row's domain or file names its expert; routed: the router as it is does."
        ),
    ] = "domain",
    expert_of: Annotated[
        list[str] | None,
        typer.Option(help="DOMAIN=ID, where a domain is not called as its expert. Repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON here.")] = None,
    seed: Annotated[int, typer.Option(help="Of folds and fine-tuning.")] = 0,
) -> None:
    """Fit centroids, classifier, hybrid weight, temperatures and thresholds again; experts stay.

    Example:
        loramux router fit my-pool --data corpus --hybrid-weight learned
        loramux router fit my-pool --data corpus --foreign others --false-routing 0.05
    """
    import json
    from dataclasses import asdict
    from typing import get_args

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    from loramux.router.fit.router import RouterFitOptions
    from loramux.router.fit.transformer import TransformerFitOptions
    from loramux.server.pool.refit import CHOICES, LabelSource, RefitOptions, refit

    if classifier not in CHOICES:
        raise typer.BadParameter(f"choose one of {', '.join(CHOICES)}", param_hint="--classifier")
    if labels not in get_args(LabelSource):
        raise typer.BadParameter("choose domain or routed", param_hint="--labels")
    options = RefitOptions(
        classifier=classifier,
        encoder=transformer,
        labels=labels,  # type: ignore[arg-type]
        experts=dict(_pair(text) for text in expert_of or ()),
        fit=RouterFitOptions(
            hybrid_weight=_share(hybrid_weight), rejected=rejected, false_routing=false_routing, seed=seed
        ),
        transformer=TransformerFitOptions(epochs=epochs, rate=rate, seed=seed),
    )
    stderr = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bars:
        task = bars.add_task("reading", total=None)
        report = refit(
            pool,
            data,
            options,
            foreign or (),
            lambda what, done, whole: bars.update(
                task, description=what, completed=done, total=whole if whole else None
            ),
        )
    print_refit(report, Console())
    if out is not None:
        out.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")


def print_refit(report: RefitReport, console: Console) -> None:
    """The held-out figures of every candidate as a table."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, title="Held-out rows, by classifier and strategy", title_justify="left")
    for heading in ("classifier", "strategy"):
        table.add_column(heading, no_wrap=True)
    for heading in ("right", "nats", "ECE", "temp.", "least", "lost", "false"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, lines in report.candidates.items():
        for number, line in enumerate(lines):
            passed = line["false_routing"]
            table.add_row(
                "" if number else name,
                line["strategy"],
                f"{line['accuracy']:.1%}",
                f"{line['nll']:.3f}",
                f"{line['ece']:.3f}",
                f"{line['temperature']:.3g}",
                f"{line['threshold']:.3f}",
                f"{line['lost']:.1%}",
                "-" if passed is None else f"{passed:.1%}",
            )
    console.print(table)
    rows = sum(report.rows.values())
    skipped = f", {report.skipped} rows are for no expert" if report.skipped else ""
    console.print(
        "least: the threshold; lost: own texts below it; false: foreign texts above it", style="dim"
    )
    console.print(
        f"{report.classifier}, cosine's share {report.hybrid_weight:g}: fitted on {rows} rows{skipped}"
    )


def _pair(text: str) -> tuple[str, str]:
    domain, equals, id = text.partition("=")
    if not equals or not domain or not id:
        raise typer.BadParameter(f"{text!r}: write it as DOMAIN=ID", param_hint="--expert-of")
    return domain, id


def _share(text: str) -> float | None:
    if text == LEARNED:
        return None
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise typer.BadParameter(
            f"{text!r}: give {LEARNED} or a number from 0 to 1", param_hint="--hybrid-weight"
        )
    return share
