"""`loramux config`."""

import json
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from loramux.server.cli.flags import put
from loramux.server.settings import load_settings, setting_names, setting_sources

HIDDEN = "(hidden)"


def config(
    file: Annotated[Path | None, typer.Option("--config", help="YAML file of settings.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting, as limits.max_n=4; repeatable.")
    ] = None,
    changed: Annotated[bool, typer.Option(help="Only what is not a default.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Print the settings that `serve` would have, and where each was written.

    Example: LORAMUX_PORT=9000 loramux config --changed
    """
    flags: dict[str, Any] = {}
    for text in setting or ():
        put(flags, text)
    settings = load_settings(file, flags)
    sources = setting_sources(file, flags)
    rows = [
        (name, shown(reduce(getattr, name.split("."), settings)), sources.get(name, "default"))
        for name, _, _ in setting_names()
        if name in sources or not changed
    ]
    if as_json:
        found = {name: {"value": value, "source": source} for name, value, source in rows}
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table(box=None)
    for heading in ("setting", "value", "from"):
        table.add_column(heading, overflow="fold")
    for name, value, source in rows:
        table.add_row(name, json.dumps(value), source)
    Console().print(table)


def shown(value: object) -> Any:
    """As JSON has it, with keys hidden."""
    if isinstance(value, SecretStr):
        return HIDDEN
    if isinstance(value, tuple):
        return [shown(one) for one in value]
    return str(value) if isinstance(value, Path) else value
