"""A replica's side of the connection to its edge: what comes in is done, what happens goes out."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loramux.adapters.residency import Lease
from loramux.adapters.sparse.model import SparseModel
from loramux.adapters.sparse.options import ReadOptions
from loramux.server.core import Core
from loramux.server.engine.protocol import EngineClosed
from loramux.server.leases import Leases
from loramux.server.logo import LocalHearing
from loramux.server.replicas.codec import error_body, event_body, lease_body, mixture_of, work_of
from loramux.server.replicas.frames import Message, encode, receive
from loramux.server.replicas.outline import card_body, outlines

log = logging.getLogger("loramux")

#: How often an edge hears of a replica: of changed statistics, and that it lives.
REPORT_SECONDS, ALIVE_SECONDS = 0.25, 2.0


@dataclass(eq=False)
class _Held:
    """A lease that the edge holds, and the sequences that run under it: it ends after all of them."""

    task: asyncio.Task[None] | None = None
    lease: Lease | None = None
    users: int = 0
    released: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def settle(self) -> None:
        if self.released and not self.users:
            self.over.set()


class Desk:
    """Serves one edge over one connection, until that ends.

    Attributes:
        changed: whether the pool is another one than the edge found.
        stopped: whether the edge has said that this is the end of the process.
    """

    def __init__(self, core: Core, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.changed = False
        self.stopped = False
        self._core = core
        self._reader = reader
        self._writer = writer
        self._leases = Leases(core.residency, core.shelf, core.mixtures)
        self._hearing = LocalHearing(core.engine)
        self._held: dict[int, _Held] = {}
        self._runs: dict[int, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._events: list[list[Any]] = []
        self._actions: dict[str, Callable[[Message], Awaitable[Message]]] = {
            "add": self._add,
            "remove": self._remove,
            "hear": self._hear,
        }

    async def serve(self) -> None:
        """Until the edge has gone, or says that this is the end.

        Raises:
            EngineClosed: the engine died.
        """
        reporting = asyncio.create_task(self._report())
        listening = asyncio.create_task(self._listen())
        try:
            done, _ = await asyncio.wait((reporting, listening), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (reporting, listening, *self._runs.values(), *self._tasks):
                task.cancel()
            for number in list(self._held):  # each ends when the last sequence under it has
                self._release(number)
            self._writer.close()

    def hello(self) -> None:
        """What the edge has to know first."""
        core = self._core
        residency = core.residency.stats()
        self._post(
            {
                "hello": {
                    "max_context": core.engine.max_context,
                    "eos_ids": core.eos_ids,
                    "width": core.width,
                    "rows": core.rows,
                    "experts": outlines(core.residency.experts.values()),
                    "sparse": [card_body(card) for card in core.shelf.cards.values()],
                    "resident": [
                        core.residency.experts[id].content_hash for id in residency.resident_experts
                    ],
                }
            }
        )

    def leave(self) -> None:
        """Ask the edge to take its work elsewhere; it ends this process when that is done."""
        self._post({"leaving": True})

    async def _listen(self) -> None:
        while True:
            try:
                message = await receive(self._reader)
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            if message["do"] == "stop":
                self.stopped = True
                await self._core.engine.stop(message["timeout"])
                return
            self._take(message)

    def _take(self, message: Message) -> None:
        number = message["id"]
        match message["do"]:
            case "run":
                held = None if message["lease"] is None else self._held[message["lease"]]
                if held is not None:
                    held.users += 1
                run = self._runs[number] = asyncio.create_task(self._run(number, message, held))
                run.add_done_callback(lambda _: self._ran(number, held))
            case "cancel":
                if (running := self._runs.get(number)) is not None:
                    running.cancel()
            case "lease":
                held = self._held[number] = _Held()
                held.task = asyncio.create_task(self._lease(number, held, message))
                held.task.add_done_callback(lambda _: self._held.pop(number))
            case "release":
                self._release(number)
            case action:
                self._begin(self._act(number, self._actions[action], message))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # What runs

    async def _run(self, number: int, message: Message, held: _Held | None) -> None:
        try:
            adapter = None if held is None or held.lease is None else held.lease.handle
            async with aclosing(self._core.engine.run(work_of(message["work"], adapter))) as events:
                async for event in events:
                    self._tell([number, event_body(event)])
        except Exception as error:
            self._tell([number, self._failure(error)])

    def _ran(self, number: int, held: _Held | None) -> None:
        del self._runs[number]
        if held is not None:
            held.users -= 1
            held.settle()

    def _tell(self, entry: list[Any]) -> None:
        """The events of a step go out as one message."""
        if not self._events:
            asyncio.get_running_loop().call_soon(self._flush)
        self._events.append(entry)

    def _flush(self) -> None:
        events, self._events = self._events, []
        self._post({"events": events})

    # What is held

    async def _lease(self, number: int, held: _Held, message: Message) -> None:
        try:
            mixture = mixture_of(message["mixture"], self._core.residency.experts)
            async with self._leases.lease(mixture) as lease:
                held.lease = lease
                self._post({"id": number, "ok": lease_body(lease)})
                await held.over.wait()
        except Exception as error:
            self._post({"id": number, "error": self._failure(error)})

    def _release(self, number: int) -> None:
        held = self._held.get(number)
        if held is None:
            return
        held.released = True
        if held.lease is None and held.task is not None:  # nobody waits for it any more
            held.task.cancel()
        held.settle()

    # What changes the pool

    async def _act(
        self, number: int, action: Callable[[Message], Awaitable[Message]], message: Message
    ) -> None:
        try:
            self._post({"id": number, "ok": await action(message)})
        except Exception as error:
            self._post({"id": number, "error": self._failure(error)})

    async def _add(self, message: Message) -> Message:
        """Read an adapter and be ready to serve it; the edge decides whether anybody hears of it."""
        self.changed = True
        options = ReadOptions(**message["options"])
        found = await asyncio.to_thread(self._core.read, Path(message["folder"]), message["name"], options)
        if isinstance(found, SparseModel):
            return {"sparse": card_body(await self._core.shelf.add(found))}
        self._core.residency.add_expert(found)
        return {"expert": outlines([found])}

    async def _remove(self, message: Message) -> Message:
        self.changed = True
        name = message["name"]
        if name in self._core.shelf.cards:
            self._core.shelf.remove(name)
        else:
            self._core.residency.remove_expert(name)
        return {}

    # What is heard inside the base

    async def _hear(self, message: Message) -> Message:
        """The signals of experts for a prompt, for the strategy `logo`."""
        experts = {id: self._core.residency.experts[id] for id in message["experts"]}
        found = await self._hearing.signals(tuple(message["prompt"]), experts, message["signal"])
        return {"signals": list(found)}

    # What is told

    async def _report(self) -> None:
        last: Message = {}
        told = 0.0
        while True:
            stats = self._stats()
            if stats["engine"]["dead"] is not None:
                raise EngineClosed(stats["engine"]["dead"])
            if stats != last or time.monotonic() - told > ALIVE_SECONDS:
                self._post({"stats": stats if stats != last else None})
                last, told = stats, time.monotonic()
            await asyncio.sleep(REPORT_SECONDS)

    def _stats(self) -> Message:
        core = self._core
        sparse = core.shelf.stats()
        return {
            "engine": asdict(core.engine.stats()),
            "residency": asdict(core.residency.stats()),
            "sparse": {"nbytes": sparse.nbytes, "loads": {id: tuple(x) for id, x in sparse.loads.items()}},
            "token_bytes": core.mixtures.nbytes,
        }

    def _failure(self, error: Exception) -> Message:
        body = error_body(error)
        if body["kind"] == "unexpected":
            log.error("a request failed", exc_info=error)
        return body

    def _post(self, message: Message) -> None:
        if not self._writer.is_closing():
            self._writer.write(encode(message))
