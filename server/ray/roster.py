"""The engines that Ray runs, as an edge finds and takes them."""

import logging
import random
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from loramux.server.errors import StartError
from loramux.server.ray.wires import Address, connect
from loramux.server.replicas.frames import Message
from loramux.server.settings import Settings

log = logging.getLogger("loramux")

#: Between two looks for an engine that is free.
LOOK_SECONDS = 0.25
#: How often it is said that none is.
REMIND_SECONDS = 60.0


class Roster:
    """Which engines there are, and which of them this edge has. Used from threads."""

    def __init__(self, find: Callable[[], Sequence[Address]]) -> None:
        """`find` says which engines run now; it may leave one out."""
        self._find = find
        self._lock = threading.Lock()
        self._taken: set[Address] = set()

    def launch(self, _settings: Settings, number: int, **_: int) -> "RemoteLife":
        """The life of the next engine that is found, which has the settings from Ray."""
        return RemoteLife(number, self)

    def take(self, number: int, over: threading.Event) -> tuple[Address, socket.socket, Message] | None:
        """Connect to an engine that no edge has; blocks until there is one, or `over`."""
        looks = 0
        while not over.is_set():
            if (address := self._next()) is not None:
                try:
                    link, hello = connect(address)
                except OSError as error:
                    log.debug("no connection to an engine: %s", error)
                    self.give_back(address)
                else:
                    log.info("replica %d is engine %s at %s", number, address.name, address.host)
                    return address, link, hello
            looks += 1
            if looks % (REMIND_SECONDS // LOOK_SECONDS) == 0:
                log.warning("replica %d waits for an engine", number)
            over.wait(LOOK_SECONDS)
        return None

    def give_back(self, address: Address) -> None:
        """This edge does not have it any more."""
        with self._lock:
            self._taken.discard(address)

    def _next(self) -> Address | None:
        """One that nobody here has, which is taken then; any, so that one that does not answer stands before
        no other."""
        found = self._find()
        with self._lock:
            free = [address for address in found if address not in self._taken]
            if not free:
                return None
            address = random.choice(free)
            self._taken.add(address)
            return address


class RemoteLife:
    """A `Life` on an engine that Ray started: it begins and ends with the connection."""

    stays = True

    def __init__(self, number: int, roster: Roster) -> None:
        self.number = number
        self._roster = roster
        self._over = threading.Event()
        self._had: tuple[Address, socket.socket] | None = None

    def hello(self) -> Message:
        """What an engine says that is free now; blocks until there is one.

        Raises:
            StartError: the edge has given it up.
        """
        found = self._roster.take(self.number, self._over)
        if found is None:
            raise StartError(f"replica {self.number} was given up before an engine was found")
        address, link, hello = found
        self._had = address, link
        if self._over.is_set():
            self.end()
        return hello

    @property
    def link(self) -> socket.socket:
        """The connection."""
        assert self._had is not None
        return self._had[1]

    @property
    def pid(self) -> int:
        """Of its process, on its machine."""
        return 0 if self._had is None else self._had[0].pid

    @property
    def ending(self) -> str:
        """Ray knows more."""
        return "the connection ended"

    def kill(self) -> None:
        """End the connection, on which the engine stops what it does for this edge."""
        self._over.set()
        if self._had is not None:
            with suppress(OSError):
                self._had[1].shutdown(socket.SHUT_RDWR)

    def end(self, _patience: float = 0.0) -> None:
        """It is over; the engine may be taken again."""
        self.kill()
        if self._had is not None:
            address, link = self._had
            link.close()
            self._roster.give_back(address)
