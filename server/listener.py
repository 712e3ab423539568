"""The socket that the server listens on."""

import contextlib
import socket

from loramux.server.errors import StartError


def listen(host: str, port: int) -> socket.socket:
    """The listening socket, taken before anything is loaded, so that a taken port is known at once.

    Raises:
        StartError: the address is not there, or taken.
    """
    with contextlib.ExitStack() as undo:
        try:
            family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = undo.enter_context(socket.socket(family, kind, proto))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise StartError(
                f"cannot listen on {host} port {port}: {error.strerror}; choose another with --host or --port"
            ) from None
        undo.pop_all()
        return listener


def address_of(host: str, listener: socket.socket) -> str:
    """The URL at which a client of this machine finds it."""
    port = listener.getsockname()[1]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{shown}:{port}"
