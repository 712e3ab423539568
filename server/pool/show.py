"""What a pool holds, for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from loramux.router.header import Header, read_header
from loramux.router.store import ROUTER_FILE
from loramux.server.pool.manifest import Pool


def print_pool(pool: Pool, console: Console | None = None) -> None:
    """Base, encoder, and a table of experts and sparse models; no weight is read.

    Raises:
        RouterError: `router.json` cannot be read.
    """
    console = console or Console()
    manifest = pool.manifest
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
    table.add_column("description")
    for entry in manifest.experts:
        table.add_row(entry.id, "expert", str(entry.rows), entry.description)
    for model in manifest.sparse:
        table.add_row(model.id, str(model.kind), "", model.description)
    console.print(table)


def encoder_text(header: Header) -> str:
    """Which encoder a router was made with, and where it is."""
    spec = header.encoder
    size = f"{spec.dimension} dimensions, {spec.max_tokens} tokens"
    if header.encoder_package is not None:
        return f"{header.encoder_package.name} of {header.encoder_package.wheel} ({spec.id}), {size}"
    place = "in the pool" if header.encoder_path is not None else "in the local hub cache"
    return f"{spec.id} {place}, {size}"
