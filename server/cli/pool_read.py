"""`loramux pool check | list | show`: what pools are and hold; nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

Pool = Annotated[
    Path | None, typer.Argument(metavar="[POOL]", help="Pool directory; default: the pool that ships.")
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


def check(
    pool: Pool = None,
    files: Annotated[
        bool, typer.Option("--files", help="Manifest and file hashes alone, which takes a moment.")
    ] = False,
) -> None:
    """Verify manifest, file hashes, base, every expert and the router; exit status 1 if anything is wrong.

    Example: loramux pool check my-pool
    """
    from loramux.server.pool.manifest import verify
    from loramux.server.settings import DEFAULT_POOL

    root = pool or DEFAULT_POOL
    problems = verify(root)
    if not files:
        from loramux.server.pool.check import check_content

        problems += check_content(root)
    for problem in problems:
        typer.echo(f"loramux: error: {' '.join(problem.split())}", err=True)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{root}: {'its files are as they were made' if files else 'sound'}")


def list_pools(
    folder: Annotated[
        list[Path] | None, typer.Argument(help="Folders to look in, themselves or one below; default: this.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the pool that ships and the pools in folders: name, base, how many experts and sparse models.

    Example: loramux pool list /srv/pools
    """
    from loramux.server.pool.listing import list_pools as found

    pools = found(folder or [Path()])
    if as_json:
        typer.echo(json.dumps([one.json() for one in pools], indent=2))
        return
    for one in pools:
        typer.echo(one.line())


def show(pool: Pool = None, as_json: AsJson = False) -> None:
    """Print base, encoder, experts and sparse models of a pool, and what each expert gains over the base.

    Example: loramux pool show my-pool
    """
    from loramux.server.pool.manifest import read_pool
    from loramux.server.pool.show import pool_json, print_pool
    from loramux.server.settings import DEFAULT_POOL

    found = read_pool(pool or DEFAULT_POOL)
    if as_json:
        typer.echo(json.dumps(pool_json(found), indent=2, ensure_ascii=False))
    else:
        print_pool(found)
