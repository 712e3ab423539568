"""`loramux doctor`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from loramux.server.cli.flags import put


def doctor(
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    pool: Annotated[Path | None, typer.Option(help="Pool directory; default: the pool that ships.")] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Server that is to generate in place of a process here; repeatable."),
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting, as limits.max_n=4; repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say whether a pool can be served here with these settings, and what to do where not.

    Looks at packages, device, compiled kernels, port, the pool's files, wheels, encoder, experts, and the
    memory that all would take. With backends, at these instead of device, kernels and memory: each has to
    answer, hold the pool's base, and load and unload two adapters of zeros. Exit status 1 if there is a
    problem that keeps the server from starting.

    Example:
        loramux doctor
        loramux doctor --pool my-pool --set quantization=int8 --json
        loramux doctor --pool my-pool --backend http://127.0.0.1:8000 --set backend.max_lora_rank=64
    """
    from loramux.server.doctor.examine import examine
    from loramux.server.doctor.finding import Finding, Level
    from loramux.server.settings import load_settings

    flags: dict[str, Any] = {} if pool is None else {"pool": pool}
    if backend:
        flags["backend"] = {"urls": backend}
    for text in setting or ():
        put(flags, text)
    findings: list[Finding] = []
    for finding in examine(load_settings(config, flags)):
        findings.append(finding)
        if not as_json:
            typer.echo(finding.lines())
    problems = sum(one.level is Level.PROBLEM for one in findings)
    if as_json:
        report = {"ok": not problems, "findings": [one.json() for one in findings]}
        typer.echo(json.dumps(report, indent=2))
    elif problems:
        typer.echo(f"{problems} problem{'s' * (problems != 1)} to mend before the server can start")
    else:
        typer.echo("nothing keeps the server from starting")
    if problems:
        raise typer.Exit(1)
