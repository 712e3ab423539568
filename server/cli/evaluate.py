"""`loramux evaluate`: how well a pool routes, and what its blends are worth."""

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    data: Annotated[
        Path, typer.Option(help="Folder of <domain>.test.jsonl files, and <domain>.train.jsonl if there are.")
    ],
    pool: Annotated[Path | None, typer.Option(help="Pool directory; unset: the demo pool.")] = None,
    loss_rows: Annotated[
        int, typer.Option(min=0, help="Rows a domain for the losses; 0: routing only.")
    ] = 60,
    out: Annotated[Path | None, typer.Option(help="Also write everything as JSON here.")] = None,
) -> None:
    """Print the confusion table of the router, and losses under base, blend and best expert."""
    from rich.console import Console

    from loramux.server.evaluation.report import evaluate as measure
    from loramux.server.evaluation.report import print_evaluation
    from loramux.server.settings import DEMO_POOL

    console = Console()
    with console.status("reading the data") as status:
        result = measure(pool or DEMO_POOL, data, loss_rows=loss_rows, progress=status.update)
    print_evaluation(result, console)
    if out is not None:
        out.write_text(json.dumps(result.json(), indent=1) + "\n", encoding="utf-8")
