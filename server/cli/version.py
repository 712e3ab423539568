"""`loramux version`."""

from importlib.metadata import version as installed_version

import typer


def version() -> None:
    """Print the version.

    Example: loramux version
    """
    typer.echo(f"loramux {installed_version('loramux')}")
