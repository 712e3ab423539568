"""`loramux deploy`: the server on machines that something else manages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from loramux.server.cli.commands import help_without_command
from loramux.server.cli.flags import put
from loramux.server.cli.serve import DEFAULT_QUESTION, QUESTION, ready_line
from loramux.server.errors import UsageError
from loramux.server.logs import configure_logs
from loramux.server.settings import DEFAULT_POOL, load_settings

app = typer.Typer(
    help="Deploy the server on machines that something else manages.\n\n"
    "Example: loramux deploy ray --replicas 2",
    add_completion=False,
    rich_markup_mode=None,
    callback=help_without_command,
    invoke_without_command=True,
)


@app.command()
def ray(
    replicas: Annotated[int | None, typer.Option(help="Engines that Ray starts.")] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Cluster to deploy on, as `auto` or host:port; unset: a Ray of this machine."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    host: Annotated[str | None, typer.Option(help="Address that Ray's proxy listens on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port that Ray's proxy listens on.")] = None,
    pool: Annotated[Path | None, typer.Option(help="Pool directory, the same on every machine.")] = None,
    cpus: Annotated[float | None, typer.Option(help="CPUs for each engine, and its threads.")] = None,
    gpus: Annotated[float | None, typer.Option(help="GPUs for each engine; 0.5 puts two on one.")] = None,
    per_machine: Annotated[int | None, typer.Option(help="The most engines of one machine.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting, as limits.max_n=4; repeatable.")
    ] = None,
) -> None:
    """Serve a pool by engines and an edge under Ray Serve; needs `loramux[ray]`. docs/scale.md

    Without --address Ray runs on this machine until this command is interrupted. With it the server is
    deployed on that cluster, and stays.

    Example: loramux deploy ray --replicas 2 --pool my-pool --port 8000
    """
    named = {"replicas": replicas, "host": host, "port": port, "pool": pool}
    flags: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    for text in setting or ():
        put(flags, text)
    settings = load_settings(config, flags)
    if not settings.replicas:
        raise UsageError("say with --replicas how many engines Ray is to start")
    if not settings.port:
        raise UsageError("say with --port where Ray's proxy is to listen: it takes no free one by itself")
    configure_logs(settings.log_level)
    from loramux.server.ray import deploy
    from loramux.server.ray.options import RayOptions

    count = settings.replicas
    if address is None:
        from loramux.server.pool.routing import open_pool

        open_pool(settings)  # what is wrong with it is said at once, not after each engine has tried
    if cpus is None:
        cpus = 1 if address is not None else max(1, (os.cpu_count() or 1) // count)
    deploy.connect(address, count * cpus + 1)
    if gpus is None:
        gpus = 0 if settings.device == "cpu" else deploy.gpus_each(count)
    options = RayOptions(
        settings=deploy.shipped(settings),
        cpus=cpus,
        gpus=gpus,
        per_machine=per_machine or (count if address is None else 1),
    )
    with deploy.told_to_end() as told:
        try:
            deploy.deploy(options, settings)
            question = DEFAULT_QUESTION if settings.pool == DEFAULT_POOL else QUESTION
            url = f"http://{settings.host}:{settings.port}"
            print(ready_line(url, question, needs_key=bool(options.settings.get("api_keys"))), flush=True)
            if address is None:
                told.wait()
        finally:
            if address is None:
                deploy.end()
