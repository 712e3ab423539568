"""`loramux analyze`: what adapters have learnt, looked at from inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loramux.server.cli.commands import help_without_command
from loramux.server.errors import UsageError

app = typer.Typer(
    help="Look into adapters.\n\nExample: loramux analyze importance --data corpus --html importance.html",
    add_completion=False,
    rich_markup_mode=None,
    callback=help_without_command,
    invoke_without_command=True,
)


@app.command()
def importance(
    data: Annotated[
        list[Path],
        typer.Option(
            help="JSONL file of rows, or a folder of them (*.test.jsonl only, where there are such); a row's "
            "`domain`, else its file, is its task. Repeatable."
        ),
    ],
    pool: Annotated[Path | None, typer.Option(help="Pool directory; default: the pool that ships.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="A LoRA or sparse model beside the pool's own. Repeatable."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="An expert or sparse model of the pool; unset: its sparse models. Repeatable."),
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Rows of each task; 0: all.")] = 20,
    max_tokens: Annotated[int, typer.Option(min=8, help="Longer rows lose the end of their answer.")] = 512,
    batch_tokens: Annotated[int, typer.Option(min=64, help="Tokens of one forward pass.")] = 1024,
    each_row: Annotated[
        bool, typer.Option("--each-row", help="Of every row's own loss, averaged; else of the task's loss.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of what --limit draws.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write everything as JSON here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one page with plots here.")] = None,
) -> None:
    """How much each task's loss depends on each rank of an adapter, as the LoRACoE paper measures it.

    Example: loramux analyze importance --pool my-pool --data corpus --limit 20 --html importance.html
    """
    import json

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from loramux.server.importance.analyse import Options, analyse
    from loramux.server.importance.page import page
    from loramux.server.importance.table import print_analysis
    from loramux.server.settings import DEFAULT_POOL

    options = Options(
        data=tuple(data),
        adapters=dict(_adapter(text) for text in adapter or ()),
        only=tuple(only or ()),
        limit=limit or None,
        max_tokens=max_tokens,
        batch_tokens=batch_tokens,
        each_row=each_row,
        seed=seed,
        device=device,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    stderr = Console(stderr=True)
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bars:
        task = bars.add_task("reading", total=None)
        found = analyse(
            pool or DEFAULT_POOL,
            options,
            lambda what, done, whole: bars.update(
                task, description=what, completed=done, total=whole if whole else None
            ),
        )
    print_analysis(found)
    if out is not None:
        out.write_text(json.dumps(found.json()) + "\n", encoding="utf-8")
    if html is not None:
        html.write_text(page(found), encoding="utf-8")


def _adapter(text: str) -> tuple[str, Path]:
    """`NAME=PATH`.

    Raises:
        UsageError: not of this form, or there is no such folder.
    """
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise UsageError(f"--adapter {text!r}: give NAME=PATH, such as all=adapters/all")
    if not Path(path).is_dir():
        raise UsageError(f"--adapter {name}: {path} is no directory; give the folder of the adapter")
    return name, Path(path)
