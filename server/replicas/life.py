"""What an edge needs of whatever runs one replica."""

import socket
from typing import Protocol

from loramux.server.replicas.frames import Message


class Life(Protocol):
    """One life of a replica, from the call that begins it: a process of this machine, or an engine elsewhere.

    `stays` is whether it is there before its edge and after it: then only the connection begins and ends.
    """

    @property
    def number(self) -> int: ...
    @property
    def stays(self) -> bool: ...
    @property
    def link(self) -> socket.socket:
        """The connection to it."""
        ...

    @property
    def pid(self) -> int:
        """Of its process."""
        ...

    @property
    def ending(self) -> str:
        """How it ended, in words."""
        ...

    def hello(self) -> Message:
        """What it says when it is ready; blocks until then.

        Raises:
            StartError: it cannot start.
        """
        ...

    def kill(self) -> None:
        """End it at once; whoever reads the connection learns of it."""
        ...

    def end(self, patience: float = 0.0) -> None:
        """Wait until it has ended, and see to that after `patience` seconds."""
        ...
