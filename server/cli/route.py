"""`loramux route`: routing decisions on the terminal."""

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loramux.server.errors import UsageError

if TYPE_CHECKING:
    from loramux.router.decision import Decision

#: Texts that the encoder reads at once.
_BATCH = 64


def route(
    text: Annotated[
        str | None,
        typer.Argument(metavar="[TEXT]", help="The text to route; - reads a text a line of stdin."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="Texts to route: a .txt file with one a line, JSONL rows, or a folder of these. A JSON "
            "object a text is printed."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    pool: Annotated[Path | None, typer.Option(help="Pool directory; default: the pool that ships.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole decision as JSON.")] = False,
) -> None:
    """Say which experts texts would go to, and why. The base model is not loaded.

    Of several texts (--file, stdin) each decision is a line of JSON, with its text.

    Example:
        loramux route "Write a haiku about rain"
        loramux route --file prompts.txt > decisions.jsonl
    """
    from loramux.router.decision import STRATEGIES
    from loramux.server.pool.routing import load_pool_router, open_pool
    from loramux.server.settings import load_settings
    from loramux.server.wire.decision import explained

    texts = _texts(text, file)
    settings = load_settings(config, {} if pool is None else {"pool": pool})
    router = load_pool_router(settings, open_pool(settings))
    if settings.routing.strategy not in STRATEGIES:
        served = settings.routing.strategy
        typer.echo(f"the server's strategy is {served}, which asks the experts; the router says:", err=True)
    if texts is not None:
        for batch in _batches(texts):
            for one, decision in zip(batch, router.decide(batch), strict=True):
                typer.echo(json.dumps({"text": one, **explained(decision)}, ensure_ascii=False))
        return
    [decision] = router.decide([text or ""])
    if as_json:
        typer.echo(json.dumps(explained(decision), indent=2))
    else:
        _print(decision)


def _texts(text: str | None, file: Path | None) -> Iterable[str] | None:
    """Many texts; None where there is one, the argument.

    Raises:
        UsageError: neither or both were given.
        PoolError, RowError: the file cannot be read.
    """
    if (text is None) == (file is None):
        raise UsageError("give a text, - for stdin, or --file; see `loramux route --help`")
    if file is not None:
        from loramux.server.pool.example_texts import read_texts

        return read_texts([file])
    return _lines() if text == "-" else None


def _lines() -> Iterator[str]:
    """Lines of stdin that say anything.

    Raises:
        UsageError: they are no UTF-8.
    """
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError:
            raise UsageError(f"stdin, line {number}: not UTF-8") from None
        if text:
            yield text


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts as they come, some at a time; a terminal's lines one by one."""
    size = 1 if sys.stdin.isatty() else _BATCH
    rest = iter(texts)
    while batch := list(islice(rest, size)):
        yield batch


def _print(decision: "Decision") -> None:
    small = 0
    for expert in decision.experts:
        if expert.weight < 0.005:
            small += 1
            continue
        probability = "" if expert.probability is None else f"  probability {expert.probability:.3f}"
        typer.echo(f"{expert.weight:6.2f}  {expert.id:<32}  similarity {expert.similarity:.3f}{probability}")
    left_out = f" ({small} with less than a hundredth left out)" if small else ""
    typer.echo(f"{decision.reason}{left_out}")
