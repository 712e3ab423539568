"""An engine that waits for an edge: one at a time, by TCP."""

import asyncio
import hmac
import logging
import os
import socket
from collections.abc import Callable

from loramux.server.core import Core
from loramux.server.engine.protocol import EngineClosed
from loramux.server.ray.wires import SECRET_BYTES, Address, new_secret, notice_silence
from loramux.server.replicas.desk import Desk
from loramux.server.replicas.frames import encode

log = logging.getLogger("loramux")

#: A connection has so long to say the secret.
GREETING_SECONDS = 10.0


class Seat:
    """Listens for edges, and serves the one that knows the secret.

    When an edge goes away the engine waits for the next one. It ends instead, and whoever started it starts
    another, where it is not as the next edge expects it: when it was told to end, when its pool has been
    changed, when the engine has died.
    """

    def __init__(self, core: Core, end: Callable[[str], None]) -> None:
        """`end` is told why the process has to end, and ends it."""
        self._core = core
        self._end = end
        self._secret = new_secret()
        self._desk: Desk | None = None
        self._free = asyncio.Event()
        self._free.set()
        self._leaving = False

    async def open(self, host: str, name: str) -> Address:
        """Start the engine and listen on a free port of `host`."""
        await self._core.engine.start()
        self._server = await asyncio.start_server(self._meet, host, 0)
        port = self._server.sockets[0].getsockname()[1]
        return Address(name, host, port, self._secret, os.getpid())

    async def leave(self) -> None:
        """Have the edge take its work elsewhere; ends when the edge has let go."""
        self._leaving = True
        self._server.close()
        if self._desk is not None:
            self._desk.leave()
        await self._free.wait()
        await self._core.engine.stop(0)

    def check(self) -> None:
        """Raises EngineClosed: the engine has died."""
        if (reason := self._core.engine.stats().dead) is not None:
            raise EngineClosed(reason)

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if await self._is_edge(reader):
                await self._serve(reader, writer)
        finally:
            writer.close()

    async def _is_edge(self, reader: asyncio.StreamReader) -> bool:
        try:
            async with asyncio.timeout(GREETING_SECONDS):
                given = await reader.readexactly(SECRET_BYTES)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            return False
        return hmac.compare_digest(given, bytes.fromhex(self._secret))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._desk is not None or self._leaving:
            writer.write(encode({"failed": "it has an edge" if self._desk else "it is leaving"}))
            return
        link = writer.get_extra_info("socket")
        assert link.family in (socket.AF_INET, socket.AF_INET6)
        notice_silence(link)
        desk = self._desk = Desk(self._core, reader, writer)
        self._free.clear()
        why = None
        try:
            desk.hello()
            await desk.serve()
        except EngineClosed as error:
            why = f"the engine has died: {error}"
        finally:
            self._desk = None
            self._free.set()
        if desk.stopped:
            why = "its edge sent it away"
        elif desk.changed and why is None:
            why = "its edge has gone, and had changed the pool"
        if why is None:
            log.info("the edge has gone; waiting for the next one")
        elif not self._leaving:
            self._end(why)
