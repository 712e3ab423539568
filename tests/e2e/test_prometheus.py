"""A real Prometheus scrapes the running server; after some load every panel of the dashboards has data.

`make dashboards` is the same with half a minute of load.
"""

import itertools
import math
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.conftest import Server, serving
from tests.panels import RULES, Query, panel_queries, rule_queries

PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
pytestmark = pytest.mark.skipif(
    not (PROMETHEUS and PROMTOOL), reason="Prometheus is not installed (Debian: prometheus)"
)

LOAD_SECONDS = float(os.environ.get("LOAD_SECONDS", "4"))
TEXTS = (
    "What is the total number of wins when the team is Arsenal?",
    "Find all .txt files changed in the last two days",
    "Is theft punished by imprisonment or by a fine?",
    "\u2603",  # nothing that the encoder reads: the base answers alone
    "my card payment was declined " * 200,  # longer than it reads
)
NUMBERS = itertools.count()


def bodies(server: Server) -> Iterator[dict[str, Any]]:
    """Requests of every kind, for ever: routed in several ways, named, mixed by the client, arrow, sparse."""
    _, base, *cards = httpx.get(f"{server.url}/v1/models").json()["data"]
    sparse = [card["id"] for card in cards if "kind" in card["loramux"]]
    experts = [card["id"] for card in cards if card["id"] not in sparse]
    for number in itertools.count():
        text = TEXTS[number % len(TEXTS)]
        if any(map(str.isalnum, text)):  # the router remembers the scores of a text that it has seen
            text = f"{next(NUMBERS)}. {text}"
        scale = 0.1 + number % 50 / 50  # a blend that is not resident yet
        for extra in (
            {"model": "auto"},
            {"model": "auto", "routing": {"merge": "svd", "top_m": 2, "temperature": scale}},
            {"model": "auto", "routing": {"strategy": "arrow"}},
            {"model": "auto", "lora": [{"id": id, "scale": scale} for id in experts[:2]]},
            {"model": experts[number % len(experts)]},
            {"model": sparse[number % len(sparse)]},
            {"model": base["id"]},
        ):
            yield {"messages": [{"role": "user", "content": text[:1200]}], "max_tokens": 6, **extra}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def config(server: Server) -> str:
    """That of docker/prometheus, but for the target and the pace."""
    shipped = yaml.safe_load((RULES.parent / "prometheus.yml").read_text())
    shipped["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    shipped["rule_files"] = [str(RULES)]
    shipped["scrape_configs"][0]["static_configs"][0]["targets"] = [server.url.removeprefix("http://")]
    return yaml.safe_dump(shipped)


@dataclass(frozen=True)
class Prometheus:
    """Its API after the load, and a window of time that holds all of it."""

    api: httpx.Client
    window: str = ""

    def ask(self, expression: str) -> list[dict[str, Any]]:
        answer = self.api.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", f"{expression}: {answer.get('error')}"
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def is_ready(self) -> bool:
        try:
            return self.api.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def wait_for_scrape(self) -> None:
        asked = time.time()

        def scraped() -> bool:
            found = self.ask("max(timestamp(up == 1))")
            return bool(found) and float(found[0]["value"][1]) > asked

        eventually(scraped, "the server was not scraped")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One of its own, which audits what it routes."""
    with serving("--set", "routing.audit_share=1") as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has watched the server under load."""
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "prometheus.yml").write_text(config(server))
    port = free_port()
    process = subprocess.Popen(
        [
            str(PROMETHEUS),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as api:
            watching = Prometheus(api)
            eventually(watching.is_ready, "Prometheus did not start")
            started = time.monotonic()
            # A rate needs two scrapes between which something happened.
            put_under_load(server, 0)
            watching.wait_for_scrape()
            put_under_load(server, LOAD_SECONDS)
            watching.wait_for_scrape()
            yield replace(watching, window=f"{math.ceil(time.monotonic() - started) + 60}s")
    finally:
        process.terminate()
        process.wait(30)


def put_under_load(server: Server, seconds: float) -> None:
    """Four requests at a time for so long, and each kind of request with each text once in any case."""
    until = time.monotonic() + seconds
    requests = bodies(server)
    with httpx.Client(base_url=server.url, timeout=60) as client, ThreadPoolExecutor(4) as threads:
        while True:
            group = list(itertools.islice(requests, 7 * len(TEXTS)))
            for answer in threads.map(lambda body: client.post("/v1/chat/completions", json=body), group):
                assert answer.status_code == 200, answer.text
            if time.monotonic() > until:
                return


def eventually(condition: Any, complaint: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.05)


@pytest.mark.parametrize("query", panel_queries(), ids=lambda query: query.place)
def test_every_panel_has_data(prometheus: Prometheus, query: Query) -> None:
    values = [float(series["value"][1]) for series in prometheus.ask(query.asked(prometheus.window))]
    assert any(math.isfinite(value) for value in values), f"{query.asked(prometheus.window)}: {values}"


def test_every_rule_is_evaluated_and_nothing_fires(prometheus: Prometheus) -> None:
    groups = prometheus.api.get("/api/v1/rules").json()["data"]["groups"]
    rules = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert set(rules) == {query.place for query in rule_queries()}
    assert {rule["health"] for rule in rules.values()} == {"ok"}
    assert [name for name, rule in rules.items() if rule["state"] == "firing"] == []


def test_prometheus_finds_nothing_to_mend_in_our_names(server: Server, prometheus: Prometheus) -> None:
    """vLLM's are left out: a colon is for recording rules, and theirs have one."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines(keepends=True)
    ours = "".join(line for line in lines if "vllm:" not in line)
    done = subprocess.run(
        [str(PROMTOOL), "check", "metrics"], input=ours, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_all_that_is_exported_was_scraped(server: Server, prometheus: Prometheus) -> None:
    """Prometheus drops no sample, vLLM's names included."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    exported = {line.partition("{")[0].partition(" ")[0] for line in lines if not line.startswith("#")}
    stored = prometheus.api.get("/api/v1/label/__name__/values").json()["data"]
    assert exported <= set(stored)


def test_the_server_is_found_by_the_variable_of_the_dashboards(
    server: Server, prometheus: Prometheus
) -> None:
    found = prometheus.api.get("/api/v1/label/instance/values", params={"match[]": "loramux_ready"}).json()[
        "data"
    ]
    assert found == [server.url.removeprefix("http://")]


def test_a_number_that_prometheus_has_is_the_servers(server: Server, prometheus: Prometheus) -> None:
    finished = [
        line for line in httpx.get(f"{server.url}/metrics").text.splitlines() if 'outcome="finished"' in line
    ]

    def is_stored() -> bool:
        # A request is counted when its answer is on its way, which a scrape may come before.
        stored = prometheus.ask('loramux_requests_total{outcome="finished"}')
        return float(stored[0]["value"][1]) == float(finished[0].split()[-1])

    eventually(is_stored, f"Prometheus has another number than {finished[0]}")
