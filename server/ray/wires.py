"""How an edge reaches an engine of another machine: an address with a secret, and a connection by TCP."""

import contextlib
import secrets
import socket
from dataclasses import dataclass

from loramux.server.replicas.frames import FrameError, Message, receive_now

#: How long a machine that is switched off may go unnoticed.
SILENT_SECONDS = 15
#: An engine that lets a connection wait so long for its first words is passed over.
PATIENCE_SECONDS = 15.0
SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class Address:
    """Where an engine listens. Whoever knows `secret`, 64 hexadecimal digits, may be its edge; it is said
    through Ray alone."""

    name: str
    host: str
    port: int
    secret: str
    pid: int


class Occupied(ConnectionError):
    """The engine has an edge already."""


def new_secret() -> str:
    """One that nobody guesses."""
    return secrets.token_hex(SECRET_BYTES)


def connect(address: Address) -> tuple[socket.socket, Message]:
    """A connection to an engine, and what it says of itself.

    Raises:
        Occupied: it has an edge.
        OSError: it is not there, or not what it should be.
    """
    link = socket.create_connection((address.host, address.port), timeout=PATIENCE_SECONDS)
    with contextlib.ExitStack() as undo:
        undo.callback(link.close)
        notice_silence(link)
        link.sendall(bytes.fromhex(address.secret))
        try:
            message = receive_now(link)
        except EOFError:
            raise FrameError(f"{address.name} hung up") from None
        if (reason := message.get("failed")) is not None:
            raise Occupied(f"{address.name}: {reason}")
        link.setblocking(False)
        undo.pop_all()
    return link, message["hello"]


def notice_silence(link: socket.socket) -> None:
    """Have the system end the connection when the other machine does not answer any more."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: data on its way, and idle
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_SECONDS * 1000)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENT_SECONDS // 3)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENT_SECONDS // 3)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
