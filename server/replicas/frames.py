"""Messages between an edge and a replica: JSON with its length before it, over a pair of connected sockets.

Nobody else can write to such a pair, which has no name; nothing but JSON is read from it all the same.
"""

import asyncio
import json
import socket
import struct
from typing import Any

#: A message is a mapping; its meaning is that of `Desk` and of `Replica`.
Message = dict[str, Any]
_LENGTH = struct.Struct(">I")
#: More than any body that a client may send becomes.
MAX_BYTES = 2**28


class FrameError(ConnectionError):
    """What came is no message; there is no going on."""


def encode(message: Message) -> bytes:
    """A message as it is sent."""
    body = json.dumps(message, separators=(",", ":")).encode("ascii")
    if len(body) > MAX_BYTES:
        raise FrameError(f"a message of {len(body)} bytes is over the limit of {MAX_BYTES}")
    return _LENGTH.pack(len(body)) + body


async def receive(reader: asyncio.StreamReader) -> Message:
    """The next message.

    Raises:
        asyncio.IncompleteReadError: the other side has gone.
        FrameError: it is none.
    """
    return _decoded(await reader.readexactly(_size(await reader.readexactly(_LENGTH.size))))


def receive_now(link: socket.socket) -> Message:
    """The next message of a blocking socket.

    Raises:
        EOFError: the other side has gone.
        FrameError: it is none.
    """
    return _decoded(_exactly(link, _size(_exactly(link, _LENGTH.size))))


def _exactly(link: socket.socket, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        part = link.recv(min(size, 2**20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _size(head: bytes) -> int:
    size: int = _LENGTH.unpack(head)[0]
    if size > MAX_BYTES:
        raise FrameError(f"a message of {size} bytes is over the limit of {MAX_BYTES}")
    return size


def _decoded(body: bytes) -> Message:
    try:
        message = json.loads(body)
    except ValueError as error:
        raise FrameError(f"not JSON: {error}") from None
    if not isinstance(message, dict):
        raise FrameError("not a mapping")
    return message
