"""`loramux evaluate`: how well a pool routes, and what its mixtures answer."""

import json
from pathlib import Path
from typing import Annotated

import typer

from loramux.server.settings import load_settings


def evaluate(
    data: Annotated[
        list[Path],
        typer.Option(
            help="JSONL file of rows or of questions with choices, or a folder of them (*.test.jsonl only, "
            "where there are such). Repeatable."
        ),
    ],
    pool: Annotated[Path | None, typer.Option(help="Pool directory; default: the pool that ships.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    foreign: Annotated[
        list[Path] | None, typer.Option(help="The same, of texts that no expert is for. Repeatable.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Rows of each domain; 0: all.")] = 50,
    only: Annotated[
        list[str] | None,
        typer.Option(help="base, experts, routed, asking, sparse, or one system by its name. Repeatable."),
    ] = None,
    top_m: Annotated[str, typer.Option(help="Widths of the routed blends, with commas.")] = "1,3",
    max_tokens: Annotated[int, typer.Option(min=8, help="Longer rows lose the end of their answer.")] = 1024,
    max_new: Annotated[
        int, typer.Option(min=0, help="Ask for an exact match where the answer has no more tokens; 0: never.")
    ] = 48,
    seed: Annotated[int, typer.Option(help="Of what --limit draws.")] = 0,
    routing_only: Annotated[bool, typer.Option(help="Measure the router; load no base.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Write everything as JSON here; OUT.rows keeps scores, so that a run can go on."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write one page with plots here.")] = None,
) -> None:
    """Losses, exact matches and multiple choice of base, experts and blends; confusion, calibration.

    Example: loramux evaluate --pool my-pool --data corpus --limit 20 --out evaluation.json
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from loramux.server.evaluation.evaluate import Options
    from loramux.server.evaluation.evaluate import evaluate as measure
    from loramux.server.evaluation.page import page
    from loramux.server.evaluation.table import print_evaluation

    settings = load_settings(config, {} if pool is None else {"pool": pool})
    options = Options(
        data=tuple(data),
        foreign=tuple(foreign or ()),
        limit=limit or None,
        only=tuple(only or ()),
        top_m=_widths(top_m),
        max_tokens=max_tokens,
        max_new=max_new,
        seed=seed,
        routing_only=routing_only,
        ledger=None if out is None else out.with_name(f"{out.name}.rows"),
    )
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    stderr = Console(stderr=True)
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bars:
        task = bars.add_task("reading", total=None)
        result = measure(
            settings,
            options,
            lambda what, done, whole: bars.update(
                task, description=what, completed=done, total=whole if whole else None
            ),
        )
    print_evaluation(result, console)
    if out is not None:
        out.write_text(json.dumps(result.json(), indent=1) + "\n", encoding="utf-8")
    if html is not None:
        html.write_text(page(result), encoding="utf-8")


def _widths(text: str) -> tuple[int, ...]:
    try:
        widths = tuple(int(part) for part in text.split(","))
    except ValueError:
        widths = ()
    if not widths or min(widths) < 1:
        raise typer.BadParameter(f"{text!r}: give numbers from 1 on, such as 1,3", param_hint="--top-m")
    return widths
