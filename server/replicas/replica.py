"""An edge's side of one replica: what it is asked, and what comes back."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import suppress
from itertools import count
from typing import Any

from loramux.adapters.residency import Lease
from loramux.server.engine.protocol import Event, Finished, Work
from loramux.server.leases import Mixture
from loramux.server.replicas.codec import error_of, event_of, mixture_body, work_body
from loramux.server.replicas.frames import FrameError, Message, encode, receive
from loramux.server.replicas.life import Life
from loramux.server.replicas.placement import Shadow

log = logging.getLogger("loramux")

#: A replica that says nothing for so long is taken for lost.
SILENCE_SECONDS = 60.0


class Lost(Exception):
    """A replica takes no more work and what ran there has to go on elsewhere: it died, or it is to leave."""

    def __init__(self, number: int, *, died: bool) -> None:
        super().__init__(f"replica {number} {'was lost' if died else 'is leaving'}")
        self.number = number
        self.died = died


class Replica:
    """One life of a replica: when it is over, its number gets another one.

    Attributes:
        hello: what it said of itself at its start.
        load: sequences there, and requests that are about to send some.
        shadow: what is resident there, as far as the edge can know.
        stats: the last it told of itself; empty before the first.
        open: whether it gets new work.
        gone: it has ended.
    """

    def __init__(self, life: Life, hello: Message, shadow: Shadow) -> None:
        self.number = life.number
        self.hello = hello
        self.shadow = shadow
        self.load = 0
        self.stats: Message = {}
        self.open = False
        self.gone = asyncio.Event()
        self.left = asyncio.Event()
        self._life = life
        self._ids = count()
        self._asked: dict[int, asyncio.Future[Message]] = {}
        self._runs: dict[int, asyncio.Queue[Event | Exception]] = {}
        self._stopping = False
        self._writer: asyncio.StreamWriter | None = None

    async def attach(self) -> None:
        """Read what it says from now on, in a task of its own."""
        reader, self._writer = await asyncio.open_connection(sock=self._life.link)
        self._reading = asyncio.create_task(self._read(reader))

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._life.pid

    def new_id(self) -> int:
        """A number for a lease, which can be released from then on."""
        return next(self._ids)

    async def lease(self, number: int, mixture: Mixture) -> Lease:
        """Make a mixture resident there and hold it under that number.

        Raises:
            Lost: it went away. BlendError: as `Leases.lease`.
        """
        body = await self._ask(number, {"do": "lease", "mixture": mixture_body(mixture)})
        return Lease(**body, handle=None)

    def release(self, number: int) -> None:
        """End a lease, also one that has not been answered yet."""
        self._send({"do": "release", "id": number})

    async def ask(self, do: str, **fields: Any) -> Message:
        """Have something done, and wait for it.

        Raises:
            Lost: it went away. AdapterError: it could not be done.
        """
        return await self._ask(self.new_id(), {"do": do, **fields})

    async def run(self, work: Work, lease: int | None) -> AsyncGenerator[Event, None]:
        """The events of one sequence under a lease; closing it aborts the sequence.

        Raises:
            Lost: it went away, or is leaving. EngineError: as `Engine.run`.
        """
        if self.gone.is_set():
            raise Lost(self.number, died=True)
        number = self.new_id()
        events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._runs[number] = events
        self.load += 1
        ended = False
        try:
            self._send({"do": "run", "id": number, "lease": lease, "work": work_body(work)})
            while not ended:
                event = await events.get()
                if isinstance(event, Exception):
                    ended = not isinstance(event, Lost)
                    raise event
                ended = isinstance(event, Finished)
                yield event
        finally:
            self.load -= 1
            del self._runs[number]
            if not ended:
                self._send({"do": "cancel", "id": number})

    def send_away(self) -> None:
        """Take no more work, and have what runs go on elsewhere."""
        self.open = False
        self._end_runs(Lost(self.number, died=False))

    def stop(self, timeout: float) -> None:
        """Ask it to end, for which it has `timeout` seconds."""
        self.open = False
        self._stopping = True
        self._send({"do": "stop", "timeout": timeout})

    def let_go(self, timeout: float) -> None:
        """The edge ends: end it too, or leave it to the next edge."""
        if self._life.stays and self._writer is not None:
            self.open = False
            self._stopping = True
            self._writer.close()
        else:
            self.stop(timeout)

    @property
    def stays(self) -> bool:
        """Whether it is there before its edge and after it."""
        return self._life.stays

    @property
    def ending(self) -> str:
        """How its process ended."""
        return self._life.ending

    def kill(self) -> None:
        """End it at once."""
        self._life.kill()

    async def ended(self, patience: float) -> None:
        """Until it is no more; after `patience` seconds it is ended."""
        if self.stays:
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self.gone.wait()
        await asyncio.to_thread(self._life.end, patience)

    async def _ask(self, number: int, message: Message) -> Message:
        if self.gone.is_set():
            raise Lost(self.number, died=True)
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        try:
            self._send({"id": number, **message})
            return await answer
        finally:
            del self._asked[number]

    def _send(self, message: Message) -> None:
        if self._writer is not None and not self.gone.is_set():
            self._writer.write(encode(message))

    # What comes

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                async with asyncio.timeout(SILENCE_SECONDS):
                    message = await receive(reader)
                self._take(message)
        except TimeoutError:
            log.error("replica %d has said nothing for %g s; it is ended", self.number, SILENCE_SECONDS)
        except FrameError as error:
            log.error("replica %d: %s", self.number, error)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._over()

    def _take(self, message: Message) -> None:
        if "events" in message:
            for number, body in message["events"]:
                if (events := self._runs.get(number)) is not None:
                    events.put_nowait(error_of(body) if isinstance(body, dict) else event_of(body))
        elif "id" in message:
            answer = self._asked.get(message["id"])
            if answer is not None and not answer.done():
                if "ok" in message:
                    answer.set_result(message["ok"])
                else:
                    answer.set_exception(error_of(message["error"]))
        elif message.get("leaving"):
            self.left.set()
        elif message.get("stats") is not None:
            self.stats = message["stats"]

    def _over(self) -> None:
        self.open = False
        self.gone.set()
        if not self._stopping:  # it may be there without a voice
            self.kill()
        lost = Lost(self.number, died=True)
        self._end_runs(lost)
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(lost)
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()

    def _end_runs(self, lost: Lost) -> None:
        for events in self._runs.values():
            events.put_nowait(lost)
