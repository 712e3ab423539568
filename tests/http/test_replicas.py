"""An edge before two real processes on the demo pool: what a lost or drained replica changes, which is
nothing."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from loramux.server.build import build
from loramux.server.replicas.build import build_edge
from loramux.server.settings import load_settings
from tests.http.replicated import FLAGS, PROMPT, SEEDED, STREAMS, Edge, beside, busiest, check, serving


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
        edge.settle()  # the answers may be there before the system has ended the process
        after = edge.replicas()[lost["replica"]]
        assert after["restarts"] == lost["restarts"] + 1
        assert sum(one["moved_sequences"] for one in edge.replicas()) > before
    edge.settle()
    metrics = edge.http.get("/metrics").text
    assert sum(one["restarts"] for one in edge.replicas()) == 2
    assert 'loramux_replica_up{replica="1"} 1.0' in metrics


@pytest.mark.parametrize("way", ["route", "signal"])
def test_a_drained_replica_moves_its_streams(
    edge: Edge, expected: dict[str, list[Any]], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The edge does not wait until it could have had the signal too: quick streams would have ended.
    monkeypatch.setattr("loramux.server.replicas.fleet.TOLD_SECONDS", 0.01)
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
    edge.started_anew(before[chosen["replica"]])
    edge.settle()
    after = edge.replicas()[chosen["replica"]]
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
