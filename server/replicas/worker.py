"""What runs in a replica's process, with its end of a pair of sockets."""

import asyncio
import signal
import socket
import sys
from typing import TYPE_CHECKING

from loramux.adapters.errors import AdapterError
from loramux.router.errors import RouterError
from loramux.server.engine.protocol import EngineError
from loramux.server.errors import StartError
from loramux.server.logs import configure_logs
from loramux.server.replicas.frames import encode, receive_now
from loramux.server.settings import Settings

if TYPE_CHECKING:
    from loramux.server.core import Core


def main(link: socket.socket) -> None:
    """Build what the first message describes, and serve the edge at the other end of `link`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt of the terminal is the edge's to answer
    sys.stdout = sys.stderr  # the edge's is for its own ready line
    order = receive_now(link)
    number, among = order["number"], order["among"]
    settings = Settings(**order["settings"])
    configure_logs(settings.log_level, f"replica {number}")
    try:
        asyncio.run(_serve(_build(settings, number, among), link))
    except (StartError, AdapterError, RouterError, EngineError) as error:
        _fail(link, " ".join(str(error).split()))
        sys.exit(1)
    except BrokenPipeError:  # the edge has ended before this was ready
        sys.exit(1)


def _build(settings: Settings, number: int, among: int) -> "Core":
    import torch
    from transformers.utils.logging import disable_progress_bar

    from loramux.server.build import build_core
    from loramux.server.pool.routing import open_pool

    disable_progress_bar()
    if settings.device in ("auto", "cuda") and torch.cuda.device_count() > 1:
        device = f"cuda:{number % torch.cuda.device_count()}"
        settings = settings.model_copy(update={"device": device})
    return build_core(settings, open_pool(settings), among=among)


async def _serve(core: "Core", link: socket.socket) -> None:
    from loramux.server.replicas.desk import Desk

    await core.engine.start()
    try:
        reader, writer = await asyncio.open_unix_connection(sock=link)
        desk = Desk(core, reader, writer)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, desk.leave)
        desk.hello()
        await desk.serve()
    finally:
        await core.engine.stop(0)


def _fail(link: socket.socket, line: str) -> None:
    try:
        link.sendall(encode({"failed": line}))
    except OSError:
        sys.stderr.write(f"loramux: {line}\n")
