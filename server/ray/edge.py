"""The edge as a deployment of Ray Serve: HTTP comes through Ray's proxy, engines are reached directly."""

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loramux.server.engine.protocol import EngineClosed
from loramux.server.ray.options import RayOptions
from loramux.server.ray.process import prepare
from loramux.server.ray.roster import Roster
from loramux.server.ray.wires import Address

if TYPE_CHECKING:
    from fastapi import FastAPI

    from loramux.server.parts import Parts

log = logging.getLogger("loramux")

#: Ray Serve is asked for the engines, and answers within this.
ASK_SECONDS = 10.0


class Edge:
    """The one replica of the deployment `edge`."""

    # Serve awaits it.
    async def __init__(self, options: dict[str, Any], engines: Any) -> None:  # type: ignore[misc]
        """Read the pool and wait for all engines; `options` are `RayOptions`, `engines` the handle of their
        deployment.

        Raises:
            StartError, AdapterError, RouterError: one line that names the file or setting at fault.
        """
        self._parts = await asyncio.to_thread(_build, RayOptions(**options), engines)

    def __serve_build_asgi_app__(self) -> "FastAPI":
        """Ray Serve asks for what answers requests."""
        from loramux.server.app import create_app

        return create_app(self._parts)

    def check_health(self) -> None:
        """Ray Serve asks; raises where nothing will answer any more."""
        if (reason := self._parts.engine.stats().dead) is not None:
            raise EngineClosed(reason)


def _build(options: RayOptions, engines: Any) -> "Parts":
    settings = options.load()
    prepare(settings.log_level, "edge")
    from loramux.server.replicas.build import build_edge

    return build_edge(settings, launch=Roster(lambda: running(engines)).launch)


def running(engines: Any) -> Sequence[Address]:
    """The engines that answer now."""
    try:
        found = engines.broadcast("address").results(timeout_s=ASK_SECONDS, return_exceptions=True)
    except Exception as error:  # none runs yet, or the controller is busy: Ray has many names for that
        log.debug("Ray names no engine: %s: %s", type(error).__name__, error)
        return []
    return [Address(**one) for one in found if isinstance(one, dict)]
