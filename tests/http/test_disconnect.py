"""When the client leaves, the sequences are aborted first and the lease is freed after that."""

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from loramux.server.app import shut_down
from loramux.server.engine.protocol import Work
from tests.http.serving import TOKENIZER, Served, serving
from tests.kit import ScriptedEngine, saying


def watch_leases(served: Served) -> None:
    """Write the leases into the engine's log, between the starts and ends of sequences."""
    residency, log = served.parts.residency, served.engine.log
    lease = residency.lease

    @asynccontextmanager
    async def watched(blend: Any) -> Any:
        async with lease(blend) as held:
            log.append("leased")
            try:
                yield held
            finally:
                log.append("freed")

    residency.lease = watched  # type: ignore[method-assign]


def send(served: Served, path: str, body: dict[str, Any]) -> socket.socket:
    """A request by hand, so that the connection can be cut."""
    host, port = served.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


CHAT = {"model": "math", "messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_leaving_aborts_every_sequence_and_then_frees_the_lease(tmp_path: Path, stream: bool, n: int) -> None:
    with serving(tmp_path, engine=ScriptedEngine(saying(TOKENIZER, "x" * 200))) as served:
        watch_leases(served)
        served.hold()
        connection = send(served, "/v1/chat/completions", {**CHAT, "stream": stream, "n": n})
        served.wait_for(lambda: served.engine.running == n)
        connection.close()
        served.wait_for(lambda: "freed" in served.engine.log)
        assert served.engine.log == ["leased", *(f"start {i + 1}" for i in range(n)), *["abort"] * n, "freed"]
        assert served.engine.steps == 0
        assert served.metric("loramux_requests_total", outcome="aborted") == 1


def test_leaving_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    says = saying(TOKENIZER, "x" * 400)

    def held_in_the_middle(work: Work) -> Iterator[int]:
        for number, token in enumerate(says(work)):
            if number == 6:  # 400 tokens may be quicker than this test's next line
                served.hold()
            yield token

    with serving(tmp_path, engine=ScriptedEngine(held_in_the_middle)) as served:
        watch_leases(served)
        connection = send(served, "/v1/chat/completions", {**CHAT, "stream": True, "max_tokens": 400})
        assert b"200 OK" in connection.recv(100)
        served.wait_for(lambda: served.engine.steps > 5)
        connection.close()
        served.wait_for(lambda: "freed" in served.engine.log)
        assert served.engine.log == ["leased", "start 1", "abort", "freed"]
        assert served.engine.steps < 400


def test_leaving_before_the_body_is_sent(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{"
            )
        assert served.chat("law").choices[0].message.content == "Hello, world."
        assert served.engine.log == ["start 1", "finish"]


def test_one_client_leaving_does_not_touch_another(tmp_path: Path) -> None:
    with serving(tmp_path, engine=ScriptedEngine(saying(TOKENIZER, "Hello"))) as served:
        served.hold()
        leaving = send(served, "/v1/chat/completions", CHAT)
        staying = send(served, "/v1/chat/completions", CHAT)
        served.wait_for(lambda: served.engine.running == 2)
        leaving.close()
        served.wait_for(lambda: served.engine.running == 1)
        served.release()
        received = b""
        while b"Hello" not in received:
            received += staying.recv(4096)
        staying.close()


def test_a_stop_string_ends_the_sequence_in_the_engine(tmp_path: Path) -> None:
    with serving(tmp_path, engine=ScriptedEngine(saying(TOKENIZER, "one. two. three."))) as served:
        assert served.chat(stop=".").choices[0].message.content == "one"
        assert served.engine.log == ["start 1", "abort"]
        assert served.engine.steps == len("one.")


def test_after_the_drain_began_nothing_new_is_taken(tmp_path: Path) -> None:
    with serving(tmp_path, drain_seconds=20) as served:
        served.hold()
        connection = send(served, "/v1/chat/completions", CHAT)
        served.wait_for(lambda: served.engine.running == 1)
        assert served.http.get("/ready").status_code == 200
        assert served.loop is not None
        leaving = asyncio.run_coroutine_threadsafe(shut_down(served.parts), served.loop)
        served.wait_for(lambda: served.parts.lifecycle.phase == "draining")
        refused = served.http.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert served.http.get("/ready").status_code == 503
        assert served.http.get("/health").status_code == 200
        assert served.engine.open
        served.release()
        leaving.result(20)
        assert b"Hello, world." in read_all(connection)
        assert not served.engine.open


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while b'"finish_reason"' not in received:
        received += connection.recv(4096)
    connection.close()
    return received
