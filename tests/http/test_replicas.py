"""An edge before two real processes on the demo pool: what a lost or drained replica changes, which is
nothing."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from loramux.server.build import build
from loramux.server.parts import Parts
from loramux.server.replicas.build import build_edge
from loramux.server.settings import load_settings
from tests.http.serving import listening
from tests.kit import DEMO_POOL

ADMIN = {"authorization": "Bearer admin"}
#: In float32, where the order of a batch changes no token.
FLAGS = {"pool": DEMO_POOL, "device": "cpu", "dtype": "float32", "admin_key": "admin", "drain_seconds": 5}
PROMPT = "How many wins does the team have when the venue is"
SCHEMA = {
    "type": "object",
    "properties": {"words": {"type": "array", "items": {"type": "string", "maxLength": 9}, "minItems": 9}},
    "required": ["words"],
    "additionalProperties": False,
}
SEEDED = {"temperature": 1.0, "seed": 11}
BLEND = {"lora": [{"id": "total-per", "scale": 0.6}, {"id": "movie-song", "scale": 0.5}]}
STREAMS: dict[str, dict[str, Any]] = {
    "base": {"model": "loramux-demo-base"},
    "expert, seeded": {"model": "files-find", **SEEDED},
    "routed": {"model": "auto"},
    "blend, seeded and penalised": {
        "model": "auto",
        **BLEND,
        **SEEDED,
        "presence_penalty": 0.8,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
    },
    "merged, log-probabilities": {"model": "auto", "routing": {"merge": "svd"}, "logprobs": 2},
    "LoRACoE, seeded": {"model": "demo-loracoe", **SEEDED, "top_p": 0.9},
    "MixLoRA": {"model": "demo-mixlora"},
    "arrow, seeded": {"model": "auto", "routing": {"strategy": "arrow", "top_m": 2}, **SEEDED},
    "logo": {"model": "auto", "routing": {"strategy": "logo", "top_m": 2}},
    "two choices, seeded": {"model": "auto", **BLEND, **SEEDED, "n": 2},
    "JSON, seeded": {"model": "auto", "guided_json": SCHEMA, **SEEDED},
}


class Edge:
    """A server and a client of it."""

    def __init__(self, url: str, parts: Parts) -> None:
        self.url = url
        self.parts = parts
        self.http = httpx.Client(base_url=url, timeout=300)

    def stream(self, fields: dict[str, Any], arrived: Callable[[], None] = lambda: None) -> list[Any]:
        """Every choice's text, end and log-probabilities; `arrived` is called for each event."""
        body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0, "ignore_eos": True, "stream": True}
        found: dict[int, list[Any]] = {}
        with self.http.stream("POST", "/v1/completions", json=body | fields) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                assert "error" not in event, event
                for choice in event["choices"]:
                    text, ends, scores = found.setdefault(choice["index"], ["", [], []])
                    found[choice["index"]][0] = text + choice["text"]
                    ends += [choice["finish_reason"]] if choice["finish_reason"] else []
                    scores += (choice.get("logprobs") or {}).get("token_logprobs", [])
                arrived()
        return [found[index] for index in sorted(found)]

    def replicas(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.http.get("/v1/replicas", headers=ADMIN).json()["data"]
        return found

    def admin(self, route: str, **body: Any) -> httpx.Response:
        return self.http.post(f"/v1/{route}", json=body, headers=ADMIN)

    def kill(self, number: int) -> None:
        """Kill a replica, and wait until the edge knows."""
        before = self.replicas()[number]
        os.kill(before["pid"], signal.SIGKILL)
        limit = time.monotonic() + 60
        while self.replicas()[number]["restarts"] == before["restarts"]:
            assert time.monotonic() < limit
            time.sleep(0.01)

    def settle(self) -> None:
        """Wait until both replicas are there."""
        limit = time.monotonic() + 300
        while not all(one["up"] for one in self.replicas()):
            assert time.monotonic() < limit
            time.sleep(0.05)


@contextmanager
def serving(parts: Parts) -> Iterator[Edge]:
    with listening(parts) as (url, _):
        edge = Edge(url, parts)
        with edge.http:
            yield edge


@pytest.fixture(scope="module")
def undisturbed() -> Iterator[Edge]:
    with serving(build(load_settings(flags=FLAGS))) as server:
        yield server


@pytest.fixture(scope="module")
def edge() -> Iterator[Edge]:
    with serving(build_edge(load_settings(flags={**FLAGS, "replicas": 2}))) as server:
        yield server


@pytest.fixture(scope="module")
def expected(undisturbed: Edge) -> dict[str, list[Any]]:
    return {name: undisturbed.stream(fields) for name, fields in STREAMS.items()}


def check(found: list[Any], expected: list[Any]) -> None:
    for (text, ends, scores), (own_text, own_ends, own_scores) in zip(found, expected, strict=True):
        assert (text, ends) == (own_text, own_ends)
        assert scores == pytest.approx(own_scores, abs=1e-3)


def beside(edge: Edge, disturb: Callable[[], None]) -> dict[str, list[Any]]:
    """All streams at once, and `disturb` when each of them has had a few events."""
    counts = dict.fromkeys(STREAMS, 0)
    begun = threading.Event()

    def ask(name: str) -> list[Any]:
        def arrived() -> None:
            counts[name] += 1
            if min(counts.values()) >= 3:
                begun.set()

        return edge.stream(STREAMS[name], arrived)

    with ThreadPoolExecutor(len(STREAMS)) as pool:
        answers = {name: pool.submit(ask, name) for name in STREAMS}
        assert begun.wait(300)
        disturb()
        return {name: answer.result(300) for name, answer in answers.items()}


def busiest(edge: Edge) -> dict[str, Any]:
    return max(edge.replicas(), key=lambda one: one["sequences"])


def test_every_kind_of_request_gets_the_plain_servers_answer(
    edge: Edge, expected: dict[str, list[Any]]
) -> None:
    for name, fields in STREAMS.items():
        check(edge.stream(fields), expected[name])


def test_a_lost_replica_loses_no_request_and_changes_no_token(
    edge: Edge, expected: dict[str, list[Any]]
) -> None:
    for _ in range(2):
        edge.settle()
        before = sum(one["moved_sequences"] for one in edge.replicas())
        lost = busiest(edge)

        def kill() -> None:
            nonlocal lost
            lost = busiest(edge)
            os.kill(lost["pid"], signal.SIGKILL)

        for name, answer in beside(edge, kill).items():
            check(answer, expected[name])
        after = edge.replicas()[lost["replica"]]
        assert after["restarts"] == lost["restarts"] + 1
        assert sum(one["moved_sequences"] for one in edge.replicas()) > before
    edge.settle()
    metrics = edge.http.get("/metrics").text
    assert sum(one["restarts"] for one in edge.replicas()) == 2
    assert 'loramux_replica_up{replica="1"} 1.0' in metrics


@pytest.mark.parametrize("way", ["route", "signal"])
def test_a_drained_replica_moves_its_streams(edge: Edge, expected: dict[str, list[Any]], way: str) -> None:
    edge.settle()
    before = {one["replica"]: one for one in edge.replicas()}
    chosen = busiest(edge)

    def drain() -> None:
        nonlocal chosen
        chosen = busiest(edge)
        if way == "signal":
            os.kill(chosen["pid"], signal.SIGTERM)
        else:
            answer = edge.admin("drain_replica", replica=chosen["replica"])
            assert answer.json() == {"replica": chosen["replica"], "drained": True}

    for name, answer in beside(edge, drain).items():
        check(answer, expected[name])
    edge.settle()
    after = edge.replicas()[chosen["replica"]]
    assert after["pid"] != before[chosen["replica"]]["pid"]
    assert after["moved_sequences"] > before[chosen["replica"]]["moved_sequences"]


def test_a_change_of_the_pool_reaches_both_and_one_that_is_started_again(
    edge: Edge, undisturbed: Edge
) -> None:
    edge.settle()
    folder = "files-find"
    wanted = {"model": "again", **SEEDED}
    assert edge.admin("load_lora_adapter", lora_name="again", lora_path="missing").status_code == 400
    for server in (edge, undisturbed):
        answer = server.admin("load_lora_adapter", lora_name="again", lora_path=folder)
        assert answer.status_code == 200, answer.text
    own = undisturbed.stream(wanted)
    for one in edge.replicas():
        edge.settle()
        check(edge.stream(wanted), own)
        edge.kill(one["replica"])
    edge.settle()
    check(edge.stream(wanted), own)
    with edge.http.stream(
        "POST", "/v1/completions", json={"prompt": PROMPT, "stream": True, **wanted}
    ) as open_one:
        lines = open_one.iter_lines()
        next(lines)
        for server in (edge, undisturbed):
            assert server.admin("unload_lora_adapter", lora_name="again").status_code == 200
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert edge.http.post("/v1/completions", json={"prompt": "x", "model": "again"}).status_code == 404


@pytest.mark.parametrize("routing", [{}, {"merge": "svd"}, {"strategy": "logo", "top_m": 2}])
def test_an_answer_is_explained_by_the_same_losses(
    edge: Edge, undisturbed: Edge, routing: dict[str, Any]
) -> None:
    edge.settle()
    asked = {"model": "auto", "routing": {**routing, "explain": True}}
    body = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, **asked}
    first, second = (server.http.post("/v1/completions", json=body).json() for server in (edge, undisturbed))
    told, expected = first["loramux"]["explain"], second["loramux"]["explain"]
    assert told["top1"]["expert"] == expected["top1"]["expert"]
    assert told["tokens"] == expected["tokens"] > 1
    for part in ("base", "top1", "blend"):
        assert told[part]["loss"] == pytest.approx(expected[part]["loss"], abs=1e-4)
    assert told["blend"]["gain"] == pytest.approx(told["base"]["loss"] - told["blend"]["loss"], abs=1e-6)


@pytest.mark.parametrize("signal", ["norm", "entropy"])
def test_logo_hears_the_same_at_a_replica(edge: Edge, undisturbed: Edge, signal: str) -> None:
    edge.settle()
    routing = {"strategy": "logo", "top_m": 4, "signal": signal}
    body = {"model": "auto", "prompt": f"{PROMPT} {signal}", "max_tokens": 1, "routing": routing}
    told, expected = (
        server.http.post("/v1/completions", json=body).json()["loramux"]["route"]["experts"]
        for server in (edge, undisturbed)
    )
    assert [one["id"] for one in told] == [one["id"] for one in expected]
    assert [one["score"] for one in told] == pytest.approx([one["score"] for one in expected], rel=1e-4)


def test_logo_is_heard_elsewhere_when_a_replica_is_gone(edge: Edge) -> None:
    edge.settle()
    edge.kill(0)
    body = {"model": "auto", "prompt": "Elsewhere", "max_tokens": 1, "routing": {"strategy": "logo"}}
    assert edge.http.post("/v1/completions", json=body).status_code == 200
    edge.settle()


def test_what_cannot_be_drained_or_is_not_allowed_is_said(edge: Edge, undisturbed: Edge) -> None:
    assert edge.admin("drain_replica", replica=7).status_code == 409
    assert undisturbed.admin("drain_replica", replica=0).status_code == 409
    assert undisturbed.replicas() == []
    assert edge.http.get("/v1/replicas").status_code == 401


def test_sums_never_fall_and_have_their_parts(edge: Edge) -> None:
    edge.settle()

    def total(name: str) -> float:
        lines = edge.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    before = total("loramux_engine_decode_tokens_total")
    assert before > 0
    edge.kill(0)
    assert total("loramux_engine_decode_tokens_total") >= before
    assert total("loramux_replica_restarts_total") == sum(one["restarts"] for one in edge.replicas())
