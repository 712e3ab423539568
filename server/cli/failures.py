"""What goes wrong in a command: one line on stderr, 2 for how it was called and 1 for everything else."""

from typing import NamedTuple

from typer import TyperException


class Failure(NamedTuple):
    """What to print, and the exit code."""

    line: str
    code: int


def explain(error: Exception) -> Failure | None:
    """The one line for what an operator can mend; None for what only a programmer can."""
    if isinstance(error, TyperException):
        context = getattr(error, "ctx", None)
        path = "loramux" if context is None else context.command_path
        return _failure(
            f"{error.format_message().rstrip().rstrip('.')}; see `{path} --help`", error.exit_code
        )
    # These are not imported for a command that ends well.
    from loramux.adapters.errors import AdapterError
    from loramux.adapters.training.errors import OptionError
    from loramux.router.errors import RouterError
    from loramux.server.errors import StartError, UsageError

    if isinstance(error, UsageError | OptionError):
        return _failure(str(error), 2)
    if isinstance(error, StartError | AdapterError | RouterError):
        return _failure(str(error), 1)
    if isinstance(error, OSError) and error.filename is not None:
        return _failure(f"{error.filename}: {error.strerror}", 1)
    return None


def _failure(message: str, code: int) -> Failure:
    return Failure(f"loramux: error: {' '.join(message.split())}", code)
