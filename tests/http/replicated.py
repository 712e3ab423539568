"""Servers with replicas on the demo pool, asked for all kinds of answers at once."""

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

from loramux.server.parts import Parts
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
    "base": {"model": "loramux-demo-base", "max_tokens": 400},  # goes on while others have ended
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

    def started_anew(self, before: dict[str, Any]) -> None:
        """Wait until a replica is another process than it was."""
        limit = time.monotonic() + 60
        while self.replicas()[before["replica"]]["pid"] == before["pid"]:
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


def check(found: list[Any], expected: list[Any]) -> None:
    for (text, ends, scores), (own_text, own_ends, own_scores) in zip(found, expected, strict=True):
        assert (text, ends) == (own_text, own_ends)
        assert scores == pytest.approx(own_scores, abs=1e-3)


def beside(
    edge: Edge, disturb: Callable[[], None], streams: dict[str, dict[str, Any]] = STREAMS
) -> dict[str, list[Any]]:
    """All streams at once, and `disturb` when each of them has had a few events."""
    counts = dict.fromkeys(streams, 0)
    begun = threading.Event()

    def ask(name: str) -> list[Any]:
        def arrived() -> None:
            counts[name] += 1
            if min(counts.values()) >= 3:
                begun.set()

        return edge.stream(streams[name], arrived)

    with ThreadPoolExecutor(len(streams)) as pool:
        answers = {name: pool.submit(ask, name) for name in streams}
        assert begun.wait(300)
        disturb()
        return {name: answer.result(300) for name, answer in answers.items()}


def busiest(edge: Edge) -> dict[str, Any]:
    return max(edge.replicas(), key=lambda one: one["sequences"])
