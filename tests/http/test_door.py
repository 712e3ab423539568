"""Paths, hosts, media types and time limits, over real sockets."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from loramux.server.edge.patience import PatientProtocol
from tests.http.serving import Served, serving

CHAT = {"model": "auto", "messages": [{"role": "user", "content": "math"}]}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(
        tmp_path_factory.mktemp("pool"), body_seconds=0.4, cors_origins=["https://app.example"]
    ) as one:
        yield one


def exchange(served: Served, request: bytes) -> bytes:
    """What comes back until the server closes."""
    address = httpx.URL(served.url)
    with socket.create_connection((address.host, address.port or 80), timeout=10) as connection:
        connection.sendall(request)
        received = b""
        while part := connection.recv(65536):
            received += part
        return received


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/v1/models", "/metrics"])
def test_head_is_get_without_the_body(served: Served, path: str) -> None:
    answer = served.http.head(path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"] == served.http.get(path).headers["content-type"]
    assert served.metric("loramux_http_requests_total", method="HEAD", route=path, status="200") == 1


@pytest.mark.parametrize("path", ["/v1/models/", "//v1/models", "/v1//models//"])
def test_slashes_too_many_mean_nothing(served: Served, path: str) -> None:
    assert httpx.get(f"{served.url}{path}").json() == served.http.get("/v1/models").json()
    assert httpx.post(f"{served.url}/v1/chat/completions/", json=CHAT).status_code == 200


@pytest.mark.parametrize(
    ("headers", "word"),
    [
        ({"content-type": "text/plain"}, "text/plain"),
        ({"content-type": "application/x-www-form-urlencoded"}, "urlencoded"),
        ({"origin": "https://elsewhere.example"}, "Content-Type"),
        ({"content-type": "application/json", "content-encoding": "gzip"}, "Content-Encoding 'gzip'"),
    ],
)
def test_a_body_that_is_not_json_starts_nothing(served: Served, headers: dict[str, str], word: str) -> None:
    before = len(served.engine.works)
    answer = served.http.post("/v1/chat/completions", content=json.dumps(CHAT), headers=headers)
    assert answer.status_code == 415
    assert word in answer.json()["error"]["message"]
    assert len(served.engine.works) == before


@pytest.mark.parametrize(
    "kind", ["application/json", "Application/JSON; charset=utf-8", "application/x+json"]
)
def test_json_by_any_of_its_names_is_read(served: Served, kind: str) -> None:
    body = json.dumps(CHAT)
    answer = served.http.post("/v1/chat/completions", content=body, headers={"content-type": kind})
    assert answer.status_code == 200


def test_a_server_on_loopback_answers_to_its_own_names(served: Served, tmp_path: Path) -> None:
    for host in ("127.0.0.1:1", "localhost", "localhost.:80", "[::1]:8000", "LOCALHOST:8000"):
        assert served.http.get("/health", headers={"host": host}).status_code == 200
    refused = served.http.get("/v1/models", headers={"host": "rebound.example"})
    assert refused.status_code == 403
    assert "rebound.example" in refused.json()["error"]["message"]
    assert exchange(served, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    with serving(tmp_path, allowed_hosts=["rebound.example"]) as other:
        assert other.http.get("/v1/models", headers={"host": "rebound.example:80"}).status_code == 200


def test_only_the_named_origins_may_call_from_a_page(served: Served) -> None:
    def preflight(origin: str) -> httpx.Response:
        wanted = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        return served.http.options("/v1/chat/completions", headers={"origin": origin, **wanted})

    assert preflight("https://app.example").headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-origin" not in preflight("https://evil.example").headers
    page = {"origin": "https://app.example"}
    refused = served.http.post(
        "/v1/chat/completions", content="x", headers={**page, "content-type": "text/plain"}
    )
    assert refused.status_code == 415
    assert refused.headers["access-control-allow-origin"] == "https://app.example"
    answer = served.http.post("/v1/chat/completions", json=CHAT, headers=page)
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert "x-loramux-experts" in answer.headers["access-control-expose-headers"]


def test_the_answer_to_a_body_that_is_too_large_arrives(served: Served) -> None:
    body = b"x" * 20_000_000
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    answer = exchange(served, head.encode() + b"Connection: close\r\n\r\n" + body)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"body_too_large" in answer
    assert served.http.post("/v1/completions", content=body).status_code == 413


def test_half_a_body_is_given_up(served: Served) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\nConnection: close\r\n"
    answer = exchange(served, head + b'\r\n{"model": ')
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"body_timeout" in answer


WHOLE, HALF = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /health HTTP/1.1\r\nHost: local"


@pytest.mark.parametrize("sent", [b"", HALF, WHOLE + HALF, WHOLE + WHOLE + HALF])
def test_a_connection_without_a_whole_head_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    protocol = type("Quick", (PatientProtocol,), {"header_seconds": 0.2})
    original = uvicorn.Config

    def config(*arguments: object, **options: object) -> uvicorn.Config:
        return original(*arguments, http=protocol, timeout_keep_alive=600, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(uvicorn, "Config", config)
    with serving(tmp_path) as served:
        assert exchange(served, sent).count(b"HTTP/1.1 200 OK") == sent.count(WHOLE)
        # Requests that come whole are not cut off, however long their connection lives.
        assert [served.http.get("/health").status_code for _ in range(3)] == [200, 200, 200]


def test_the_page_is_there_without_a_key_and_asks_for_one(tmp_path: Path) -> None:
    with serving(tmp_path, keys=("secret",)) as served:
        page = served.http.get("/")
        assert page.status_code == 200
        assert 'id="key" type="password"' in page.text
        wrong = served.http.get("/v1/models", headers={"authorization": "Bearer no"}).json()["error"][
            "message"
        ]
        assert wrong != served.http.get("/v1/models").json()["error"]["message"]
