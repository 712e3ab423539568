"""An edge before engines that listen by TCP, as those of Ray do; without Ray, in threads of this process."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from loramux.server.build import build_core
from loramux.server.pool.routing import open_pool
from loramux.server.ray.roster import Roster
from loramux.server.ray.seat import Seat
from loramux.server.ray.wires import Address, Occupied, connect
from loramux.server.replicas.build import build_edge
from loramux.server.settings import load_settings
from tests.http.replicated import FLAGS, STREAMS, Edge, beside, busiest, check, serving

SETTINGS = load_settings(flags={**FLAGS, "replicas": 2})
#: Of every kind one that differs in what has to move.
KINDS = ("base", "expert, seeded", "merged, log-probabilities", "LoRACoE, seeded", "JSON, seeded")


class Seated:
    """An engine that listens, in a thread of its own. `why` is why its process would have ended."""

    def __init__(self, name: str) -> None:
        self.why: list[str] = []
        self.ended = threading.Event()
        self._name = name
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.address: Address = self.call(self._open())

    async def _open(self) -> Address:
        core = build_core(SETTINGS, open_pool(SETTINGS), among=2)
        self.seat = Seat(core, self._end)
        return await self.seat.open("127.0.0.1", self._name)

    def _end(self, why: str) -> None:
        self.why.append(why)
        self.ended.set()

    def call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    def close(self) -> None:
        """As Ray ends it."""
        self.call(self.seat.leave())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        self._loop.close()


@pytest.fixture
def seats() -> Iterator[list[Seated]]:
    found = [Seated("a"), Seated("b")]
    yield found
    for one in found:
        one.close()


@contextmanager
def edge_of(find: Callable[[], list[Address]]) -> Iterator[Edge]:
    parts = build_edge(SETTINGS, launch=Roster(find).launch)
    with serving(parts) as edge:
        yield edge


def test_streams_of_an_engine_that_leaves_go_on_elsewhere(seats: list[Seated]) -> None:
    """Ray ends an engine and starts another, which the edge finds; then the edge goes, another comes."""
    addresses = [one.address for one in seats]
    wanted = {name: STREAMS[name] for name in KINDS}
    with edge_of(lambda: addresses) as edge:
        expected = {name: edge.stream(fields) for name, fields in wanted.items()}

        def end() -> None:
            leaving = seats[busiest(edge)["replica"]]
            seats.remove(leaving)
            addresses.remove(leaving.address)
            leaving.close()
            assert leaving.why == []

        for name, answer in beside(edge, end, wanted).items():
            check(answer, expected[name])
        assert sum(one["moved_sequences"] for one in edge.replicas()) > 0
        seats.append(Seated("c"))
        addresses.append(seats[-1].address)
        edge.settle()
        for name, answer in beside(edge, lambda: None, wanted).items():
            check(answer, expected[name])
    with edge_of(lambda: addresses) as edge:
        check(edge.stream(wanted[KINDS[0]]), expected[KINDS[0]])
    assert [one.why for one in seats] == [[], []]


def test_an_engine_serves_one_edge_that_knows_its_secret(seats: list[Seated]) -> None:
    address = seats[0].address
    with pytest.raises(ConnectionError, match="hung up"):
        connect(replace(address, secret="0" * 64))
    with socket.create_connection((address.host, address.port), timeout=20) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: engine\r\n\r\n")
        assert stranger.recv(1) == b""
    first, hello = connect(address)
    assert hello["max_context"] > 0
    with first, pytest.raises(Occupied, match="it has an edge"):
        connect(address)


def test_an_engine_whose_pool_was_changed_ends_with_its_edge(seats: list[Seated]) -> None:
    with edge_of(lambda: [one.address for one in seats]) as edge:
        answer = edge.admin("load_lora_adapter", lora_name="again", lora_path="files-find")
        assert answer.status_code == 200, answer.text
        assert edge.http.post("/v1/completions", json={"prompt": "x", "model": "again"}).status_code == 200
    for one in seats:
        assert one.ended.wait(20)
        assert "changed the pool" in one.why[0]


def test_an_engine_that_is_sent_away_ends(seats: list[Seated]) -> None:
    with edge_of(lambda: [one.address for one in seats]) as edge:
        assert edge.admin("drain_replica", replica=0).status_code == 200
        gone = [one for one in seats if one.ended.wait(0.1)]
        assert len(gone) == 1
        assert gone[0].why == ["its edge sent it away"]
        answer: httpx.Response = edge.http.post("/v1/completions", json={"prompt": "x", "model": "auto"})
        assert answer.status_code == 200
