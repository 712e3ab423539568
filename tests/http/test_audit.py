"""A share of routed answers is scored again, after requests and never in their way."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loramux.server.engine.protocol import EngineError, EngineStats, Work
from tests.http.live import Live, live
from tests.http.serving import BASE, TOKENIZER, serving
from tests.kit import ScriptedEngine, saying

TEXT = "law math law code"


def number(server: Live, sample: str) -> float:
    found = [line for line in server.http.get("/metrics").text.splitlines() if line.startswith(sample)]
    return float(found[0].split()[-1]) if found else 0.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("adapters"), routing={"audit_share": 1.0}) as running:
        yield running


def ask(server: Live, **fields: Any) -> dict[str, Any]:
    answer = server.http.post("/v1/completions", json={"model": "auto", "max_tokens": 2, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_an_answer_is_audited_with_the_losses_that_explain_has(server: Live) -> None:
    explained = ask(server, prompt=TEXT, routing={"explain": True})["loramux"]["explain"]
    done = 'loramux_audits_total{outcome="measured"}'
    assert any(number(server, done) == 1 for _ in range(2000)), "the audit has not ended"
    tokens = number(server, 'loramux_audit_tokens_total{expert="law"}')
    assert tokens == explained["tokens"]
    for mixture in ("base", "top1", "blend"):
        sum_of = number(server, f'loramux_audit_loss_nats_total{{expert="law",mixture="{mixture}"}}')
        assert sum_of / tokens == pytest.approx(explained[mixture]["loss"], abs=1e-5)


def test_what_was_not_routed_is_not_audited(server: Live) -> None:
    done = number(server, "loramux_audits_total")
    for fields in ({"model": BASE}, {"model": "law"}, {"lora": [{"id": "law"}]}, {"prompt": "nothing"}):
        ask(server, **{"prompt": TEXT, **fields})
    ask(server, prompt=TEXT, routing={"strategy": "arrow"})
    assert number(server, "loramux_audits_total") == done


class Queued(ScriptedEngine):
    """Says that sequences wait."""

    def stats(self) -> EngineStats:
        return EngineStats(waiting=1)


def test_an_audit_is_dropped_while_requests_wait(tmp_path: Path) -> None:
    with serving(tmp_path, engine=Queued(saying(TOKENIZER, "Hi.")), routing={"audit_share": 1.0}) as served:
        served.chat("law")
        assert served.metric("loramux_audits_total", outcome="dropped") == 1
        assert len(served.engine.works) == 1


class Slow(ScriptedEngine):
    """Scores prompts once it may."""

    may = False

    async def run(self, work: Work) -> Any:
        while work.sampling.max_tokens == 0 and not self.may:
            await asyncio.sleep(0.001)
        async for event in super().run(work):
            yield event


def test_one_audit_at_a_time_and_the_others_are_dropped(tmp_path: Path) -> None:
    engine = Slow(saying(TOKENIZER, "Hi."))
    with serving(tmp_path, engine=engine, routing={"audit_share": 1.0}) as served:
        for _ in range(3):
            served.chat("law math")
        assert served.metric("loramux_audits_total", outcome="dropped") == 2
        engine.may = True
        served.wait_for(lambda: served.metric("loramux_audits_total", outcome="measured") == 1)
        assert served.metric("loramux_audit_loss_nats_total", expert="law", mixture="base") > 0


class Broken(ScriptedEngine):
    """Cannot score a prompt."""

    async def run(self, work: Work) -> Any:
        if work.sampling.max_tokens == 0:
            raise EngineError("no")
        async for event in super().run(work):
            yield event


def test_an_audit_that_fails_harms_nobody(tmp_path: Path) -> None:
    with serving(tmp_path, engine=Broken(saying(TOKENIZER, "Hi.")), routing={"audit_share": 1.0}) as served:
        served.chat("law")
        served.wait_for(lambda: served.metric("loramux_audits_total", outcome="failed") == 1)
        assert served.chat("law").choices[0].message.content == "Hi."


def test_no_audit_by_default(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        for _ in range(5):
            served.chat("law")
        assert len(served.engine.works) == 5
