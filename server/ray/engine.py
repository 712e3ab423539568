"""An engine as a deployment of Ray Serve: Ray starts it, watches it and starts it again; edges talk to it
themselves."""

import asyncio
import logging
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loramux.server.ray.options import RayOptions
from loramux.server.ray.process import prepare

if TYPE_CHECKING:
    from loramux.server.core import Core

log = logging.getLogger("loramux")


class Engine:
    """One replica of the deployment `engine`."""

    # Serve awaits it.
    async def __init__(self, options: dict[str, Any]) -> None:  # type: ignore[misc]
        """Load the base and the pool and listen for an edge; `options` are `RayOptions`.

        Raises:
            StartError, AdapterError: one line that names the file or setting at fault.
        """
        from ray.util import get_node_ip_address

        from loramux.server.ray.seat import Seat

        self._seat: Seat | None = None
        core = await asyncio.to_thread(_build, RayOptions(**options))
        self._seat = Seat(core, _end)
        self._address = await self._seat.open(get_node_ip_address(), f"{os.getpid()}")

    async def address(self) -> dict[str, Any]:
        """Where it listens, as the fields of an `Address`."""
        return asdict(self._address)

    def check_health(self) -> None:
        """Ray Serve asks; raises where the engine has died."""
        if self._seat is not None:
            self._seat.check()

    async def __del__(self) -> None:
        """Ray Serve is about to end it: its work moves. It may never have come up."""
        if self._seat is not None:
            await self._seat.leave()


def _build(options: RayOptions) -> "Core":
    settings = options.load()
    prepare(settings.log_level, "engine")
    from loramux.server.build import build_core
    from loramux.server.pool.routing import open_pool

    return build_core(settings, open_pool(settings), among=options.per_machine, devices=options.devices)


def _end(why: str) -> None:
    """End this process, in whose place Ray starts another."""
    log.warning("the engine ends: %s", why)
    logging.shutdown()
    os._exit(1)
