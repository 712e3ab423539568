"""`loramux route`: a routing decision on the terminal."""

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer

from loramux.server.settings import load_settings


def route(
    text: Annotated[str, typer.Argument(help="The text to route.")],
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    pool: Annotated[
        Path | None, typer.Option(help="Pool directory; default: the embedded demo pool.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole decision as JSON.")] = False,
) -> None:
    """Say which experts a text would go to, and why. The base model is not loaded."""
    from loramux.server.build import build_router
    from loramux.server.selection import explained, options_of

    settings = load_settings(config, {} if pool is None else {"pool": pool})
    router = build_router(settings)
    decision = asyncio.run(router.decide(text, options_of(settings.routing)))
    if as_json:
        typer.echo(json.dumps(explained(decision), indent=2))
        return
    for expert in decision.experts:
        typer.echo(f"{expert.weight:6.2f}  {expert.id:<32} similarity {expert.similarity:.3f}  "
                   f"probability {expert.probability:.3f}")  # fmt: skip
    typer.echo(decision.reason)
