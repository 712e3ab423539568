"""The process of a replica, from its start to its end."""

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from typing import ClassVar

from loramux.server.errors import StartError
from loramux.server.replicas.frames import Message, encode, receive_now
from loramux.server.replicas.worker import main
from loramux.server.settings import Settings

#: What a replica neither needs nor should know.
_SECRETS = {"api_keys", "api_key_file", "admin_key"}
_THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True, eq=False, slots=True)
class Process:
    """A started process and this end of the connection to it, which no other process can reach.

    It is forked from one that has imported everything and done nothing: libraries are read once for all
    replicas, and one that is started again need not wait for them.
    """

    stays: ClassVar[bool] = False

    number: int
    process: ForkServerProcess
    link: socket.socket

    @classmethod
    def launch(cls, settings: Settings, number: int, *, replicas: int, among: int) -> "Process":
        """Start replica `number` of `replicas`, `among` of which start at once and share the memory."""
        context = get_context("forkserver")
        context.set_forkserver_preload(["loramux.server.replicas.preload"])
        ours, theirs = socket.socketpair()
        with theirs, _threads(replicas):
            # A daemon is ended with this process; it ends by itself, too, when the connection does.
            process = context.Process(target=main, args=(theirs,), name=f"replica-{number}", daemon=True)
            process.start()
        described = settings.model_dump(mode="json", exclude=_SECRETS)
        ours.sendall(encode({"settings": described, "number": number, "among": among}))
        return cls(number, process, ours)

    def hello(self) -> Message:
        """What the replica says when it is ready; blocks until then.

        Raises:
            StartError: it says why it cannot start, or ended without a word.
        """
        try:
            message = receive_now(self.link)
        except (EOFError, OSError):
            self.link.close()
            self.end(1.0)
            raise StartError(
                f"replica {self.number} ended at its start ({self.ending}); its log has the reason"
            ) from None
        if (reason := message.get("failed")) is not None:
            self.link.close()
            self.end(1.0)
            raise StartError(f"replica {self.number}: {reason}")
        hello: Message = message["hello"]
        return hello

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid or 0

    @property
    def ending(self) -> str:
        """How it ended, in words."""
        code = self.process.exitcode
        if code is None:
            return "it runs"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        """End it at once; whoever reads the connection learns of it."""
        if self.process.exitcode is None:
            self.process.kill()

    def end(self, patience: float = 0.0) -> None:
        """Wait until it has ended, and see to that after `patience` seconds."""
        self.process.join(patience)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()


@contextmanager
def _threads(replicas: int) -> Iterator[None]:
    """The cores shared out among the replicas, unless the operator did it: OpenMP reads that as it is
    loaded, which the first of them does for all."""
    if replicas == 1 or _THREADS in os.environ:
        yield
        return
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    os.environ[_THREADS] = str(max(1, cores // replicas))
    try:
        yield
    finally:
        del os.environ[_THREADS]
