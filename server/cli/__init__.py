"""The `loramux` command. Heavy imports happen inside the commands, so that `--help` is quick."""

import importlib
import sys
from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from loramux.adapters.errors import AdapterError
from loramux.router.errors import RouterError
from loramux.server.cli.chat import chat
from loramux.server.cli.config import config
from loramux.server.cli.convert import convert
from loramux.server.cli.evaluate import evaluate
from loramux.server.cli.route import route
from loramux.server.cli.serve import serve
from loramux.server.errors import StartError
from loramux.server.large_pages import ask_for_large_pages

SUB_APPS = {
    "pool": ("loramux.server.cli.pool", "Build, check and extend pools."),
    "train": ("loramux.server.cli.train", "Train a base, an expert or an embedder."),
}

app = typer.Typer(
    help="OpenAI-compatible inference server that picks LoRA experts by reading the prompt.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.command()(route)
app.command()(chat)
app.command()(config)
app.command()(evaluate)
app.command()(convert)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"loramux {installed_version('loramux')}")


def _say_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and end."),
    ] = False,
) -> None:
    """What stands before a command."""


def _listed_only() -> None:
    """Stands in the help for a sub-app, which `main` calls without coming here."""


for _name, (_, _summary) in SUB_APPS.items():
    app.command(_name, help=_summary)(_listed_only)


def main() -> None:
    """Run the command line; what the operator can mend is one line on stderr and exit code 1."""
    ask_for_large_pages()
    arguments = sys.argv[1:]
    try:
        if arguments and arguments[0] in SUB_APPS:
            module = importlib.import_module(SUB_APPS[arguments[0]][0])
            module.app(args=arguments[1:], prog_name=f"loramux {arguments[0]}")
        else:
            app(prog_name="loramux")
    except (StartError, AdapterError, RouterError) as error:
        typer.echo(f"loramux: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
