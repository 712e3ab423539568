"""All examinations, in the order in which one depends on another."""

from __future__ import annotations

import os
from collections.abc import Iterator

from loramux.server.doctor.finding import Finding, Level
from loramux.server.doctor.software import software
from loramux.server.settings import Settings


def examine(settings: Settings) -> Iterator[Finding]:
    """Findings as they are made; no weight of the base is loaded and nothing is fetched."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    yield from software()
    try:
        from loramux.server.doctor.machine import machine, port
        from loramux.server.doctor.pool import pool
    except ImportError as error:
        yield Finding("packages", Level.PROBLEM, f"what serves cannot be imported: {error}")
        return
    if settings.backend.urls:  # nothing is generated here
        yield port(settings)
    else:
        yield from machine(settings)
    yield from pool(settings)
