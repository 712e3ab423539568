"""`loramux route`: a routing decision on the terminal."""

import json
from pathlib import Path
from typing import Annotated

import typer

from loramux.server.settings import load_settings


def route(
    text: Annotated[str, typer.Argument(help="The text to route.")],
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    pool: Annotated[Path | None, typer.Option(help="Pool directory; default: the pool that ships.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole decision as JSON.")] = False,
) -> None:
    """Say which experts a text would go to, and why. The base model is not loaded."""
    from loramux.server.pool.routing import load_pool_router, open_pool
    from loramux.server.wire.decision import explained

    settings = load_settings(config, {} if pool is None else {"pool": pool})
    decision = load_pool_router(settings, open_pool(settings)).decide([text])[0]
    if as_json:
        typer.echo(json.dumps(explained(decision), indent=2))
        return
    for expert in decision.experts:
        probability = "" if expert.probability is None else f"  probability {expert.probability:.3f}"
        typer.echo(f"{expert.weight:6.2f}  {expert.id:<32}  similarity {expert.similarity:.3f}{probability}")
    typer.echo(decision.reason)
