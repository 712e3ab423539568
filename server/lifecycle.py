"""Loading, ready, draining: whether work is taken, and how much is under way."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from loramux.server.errors import NotReady


class Phase(StrEnum):
    """Where the server is in its own life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class Lifecycle:
    """Used from the event loop only."""

    def __init__(self) -> None:
        self.phase = Phase.LOADING
        self.active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def ready(self) -> None:
        """Loading is done."""
        self.phase = Phase.READY

    def stop(self) -> bool:
        """Take no more work; what runs goes on. False when that was said before."""
        first = self.phase is not Phase.DRAINING
        self.phase = Phase.DRAINING
        return first

    @contextmanager
    def working(self) -> Iterator[None]:
        """Holds one request's place.

        Raises:
            NotReady: loading or draining.
        """
        if self.phase is not Phase.READY:
            raise NotReady(f"the server is {self.phase}")
        self.active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.active -= 1
            if not self.active:
                self._idle.set()

    async def idle(self, timeout: float) -> bool:
        """Wait until nothing runs; false when it took longer than `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
