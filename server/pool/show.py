"""What a pool holds, for people and for programs."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from loramux.router.header import Header, read_header
from loramux.router.store import ROUTER_FILE
from loramux.server.pool.facts import read_facts
from loramux.server.pool.manifest import Pool


def print_pool(pool: Pool, console: Console | None = None) -> None:
    """Base, encoder, and a table of experts and sparse models; no weight is read.

    Raises:
        RouterError: `router.json` cannot be read.
        PoolError: `report.json` is not what a build writes.
    """
    console = console or Console()
    manifest, facts = pool.manifest, read_facts(pool)
    header = read_header(pool.router_dir / ROUTER_FILE)
    console.print(
        f"pool {manifest.name}: {len(manifest.experts)} experts, {len(manifest.sparse)} sparse models"
    )
    console.print(f"base {manifest.base.id}: {manifest.base.path}", soft_wrap=True)
    console.print(f"encoder: {encoder_text(header)}", soft_wrap=True)
    for strategy, fitted in header.calibration.items():
        console.print(
            f"{strategy}: temperature {fitted.temperature:.3g}, base alone below {fitted.threshold:.3f}"
        )
    table = Table()
    table.add_column("id", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("gain", justify="right", no_wrap=True)
    table.add_column("description")
    for entry in manifest.experts:
        gain = facts[entry.id].measured.gain
        shown = "" if gain is None else f"{gain:.3f}"
        table.add_row(entry.id, "expert", str(entry.rows), shown, entry.description)
    for model in manifest.sparse:
        table.add_row(model.id, str(model.kind), "", "", model.description)
    console.print(table)
    if any(fact.measured.gain is not None for fact in facts.values()):
        console.print("gain: nats per answer token below the base, on rows that the expert never saw")


def pool_json(pool: Pool) -> dict[str, Any]:
    """The same for programs.

    Raises:
        RouterError, PoolError: as `print_pool`.
    """
    manifest, facts = pool.manifest, read_facts(pool)
    header = read_header(pool.router_dir / ROUTER_FILE)
    return {
        "path": str(pool.root),
        "name": manifest.name,
        "base": {"id": manifest.base.id, "path": manifest.base.path},
        "encoder": {
            "id": header.encoder.id,
            "package": None if header.encoder_package is None else header.encoder_package.wheel,
            "dimension": header.encoder.dimension,
            "max_tokens": header.encoder.max_tokens,
        },
        "calibration": {
            str(strategy): {"temperature": fitted.temperature, "threshold": fitted.threshold}
            for strategy, fitted in header.calibration.items()
        },
        "sampling": manifest.sampling,
        "experts": [
            {
                "id": entry.id,
                "description": entry.description,
                "rows": entry.rows,
                "top_terms": list(entry.top_terms),
                "examples": list(entry.examples),
                "gain": facts[entry.id].measured.gain,
            }
            for entry in manifest.experts
        ],
        "sparse": [
            {"id": model.id, "kind": str(model.kind), "description": model.description}
            for model in manifest.sparse
        ],
    }


def encoder_text(header: Header) -> str:
    """Which encoder a router was made with, and where it is."""
    spec = header.encoder
    size = f"{spec.dimension} dimensions, {spec.max_tokens} tokens"
    if header.encoder_package is not None:
        return f"{header.encoder_package.name} of {header.encoder_package.wheel} ({spec.id}), {size}"
    place = "in the pool" if header.encoder_path is not None else "in the local hub cache"
    return f"{spec.id} {place}, {size}"
