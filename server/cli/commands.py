"""The commands of `loramux`, each imported when it is asked for, so that the others stay quick."""

import importlib
from typing import Any, NamedTuple

import typer
from typer.core import TyperGroup
from typer.main import get_command


class Place(NamedTuple):
    """Where a command is: a function or an app of a module, and what the list of commands says of it."""

    module: str
    name: str
    summary: str


_HERE = "loramux.server.cli"
COMMANDS = {
    "serve": Place(f"{_HERE}.serve", "serve", "Serve a pool over HTTP."),
    "deploy": Place(f"{_HERE}.deploy", "app", "Deploy the server on machines that something else manages."),
    "chat": Place(f"{_HERE}.chat", "chat", "Talk to a running server in the terminal."),
    "route": Place(f"{_HERE}.route", "route", "Say which experts texts would go to, and why."),
    "doctor": Place(f"{_HERE}.doctor", "doctor", "Say whether a pool can be served here, and what to mend."),
    "config": Place(f"{_HERE}.config", "config", "Print the settings, and where each was written."),
    "pool": Place(f"{_HERE}.pool", "app", "Build, check, list, show and change pools."),
    "router": Place(f"{_HERE}.router", "app", "Fit a pool's router again."),
    "train": Place(f"{_HERE}.train", "app", "Train a base, an expert, a sparse model or an embedder."),
    "evaluate": Place(f"{_HERE}.evaluate", "evaluate", "Measure how a pool routes and what it answers."),
    "analyze": Place(f"{_HERE}.analyze", "app", "Look into adapters: which ranks matter for which task."),
    "convert": Place(f"{_HERE}.convert", "convert", "Make safetensors of an adapter's pickle, or back."),
    "version": Place(f"{_HERE}.version", "version", "Print the version."),
}


def listed_only() -> None:
    """Stands in the list of commands for one that is not imported yet."""


def load(name: str) -> Any:
    """A command as the argument parser has it, with its examples below its help."""
    place = COMMANDS[name]
    target = getattr(importlib.import_module(place.module), place.name)
    if not isinstance(target, typer.Typer):
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(name)(target)
        target = app
    command = get_command(target)
    _set_examples_apart(command)
    return command


class Commands(TyperGroup):
    """The group of all commands; the one that is called is imported then."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that the first argument names, and the arguments left for it."""
        name, listed, rest = super().resolve_command(ctx, args)
        return name, listed if name is None else load(name), rest


def help_without_command(context: typer.Context) -> None:
    """What a group does by itself: print its help to stderr, as a mistake of usage."""
    if context.invoked_subcommand is None and not context.resilient_parsing:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def _set_examples_apart(command: Any) -> None:
    """Lines after `Example:` are printed as they are, so that they can be pasted; a group lists its commands
    with their whole first sentences, which the parser would cut."""
    for child in getattr(command, "commands", {}).values():
        _set_examples_apart(child)
        sentence = " ".join((child.help or "").split()).partition(". ")[0]
        child.short_help = f"{sentence.rstrip('.')}."
    text, marker, examples = (command.help or "").partition("Example:")
    if marker:
        lines = "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines())
        command.help, command.epilog = text.strip(), f"\b\nExample:\n{lines}"
