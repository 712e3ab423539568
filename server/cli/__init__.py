"""The `loramux` command. What a command needs is imported when it is called, so that `--help` is quick."""

import os
import sys
from enum import StrEnum
from typing import Annotated

import typer
from typer.completion import (  # type: ignore[attr-defined]
    completion_init,
    get_completion_script,
)

from loramux.server.cli.commands import COMMANDS, Commands, help_without_command, listed_only
from loramux.server.cli.failures import explain
from loramux.server.cli.version import version
from loramux.server.torch_memory import arrange_memory

#: The variable by which a shell asks for what could come next.
COMPLETE = "_LORAMUX_COMPLETE"


class Shell(StrEnum):
    """Shells that can complete commands."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


app = typer.Typer(
    cls=Commands,
    help="OpenAI-compatible inference server that picks LoRA experts by reading the prompt.",
    epilog="\b\nExample:\n  loramux serve --port 8000",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _name, _place in COMMANDS.items():
    app.command(_name, help=_place.summary)(listed_only)


def _say_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


def _say_completion(shell: Shell | None) -> None:
    if shell is not None:
        typer.echo(get_completion_script(prog_name="loramux", complete_var=COMPLETE, shell=shell).strip())
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and end."),
    ] = False,
    _completion: Annotated[
        Shell | None,
        typer.Option(
            "--completion",
            callback=_say_completion,
            is_eager=True,
            help="Print what completes commands in a shell, and end.",
        ),
    ] = None,
) -> None:
    """What stands before a command."""
    help_without_command(context)


def main() -> None:
    """Run the command line; what the operator can mend is one line on stderr (`failures.py`)."""
    arrange_memory()
    if COMPLETE in os.environ:
        completion_init()
    try:
        code = app(prog_name="loramux", standalone_mode=False)
    except typer.Abort:
        sys.exit(1)
    except Exception as error:
        failure = explain(error)
        if failure is None:
            raise
        typer.echo(failure.line, err=True)
        sys.exit(failure.code)
    sys.exit(code)
