"""What routing did to a prompt: against scores asked for one by one, over the engine that computes."""

import json
import threading
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux.server.engine.protocol import EngineError, EngineOverloaded, Event, Work
from tests.http.live import Live, live
from tests.http.serving import BASE, TOKENIZER, serving
from tests.kit import ScriptedEngine, saying

EXPLAIN = {"model": "auto", "routing": {"explain": True}}
TEXT = "law math law code law math"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("adapters")) as running:
        yield running


def loss(server: Live, prompt: Any, **fields: Any) -> tuple[int, float]:
    """Scored tokens and their mean loss, by an echoed prompt."""
    body = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 0, **fields}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    scores = [
        score
        for choice in answer.json()["choices"]
        for score in choice["logprobs"]["token_logprobs"]
        if score is not None
    ]
    return len(scores), -sum(scores) / len(scores)


def check(explained: dict[str, Any], server: Live, prompt: Any, mixture: list[dict[str, Any]]) -> None:
    """Against one request for each mixture."""
    best = max(mixture, key=lambda one: one["weight"])["id"]
    tokens, base = loss(server, prompt, model=BASE)
    given = [{"id": one["id"], "scale": one["weight"]} for one in mixture]
    alone, blend = loss(server, prompt, model=best)[1], loss(server, prompt, model="auto", lora=given)[1]
    assert explained == {
        "tokens": tokens,
        "base": {"loss": pytest.approx(base, abs=1e-5)},
        "top1": {
            "expert": best,
            "loss": pytest.approx(alone, abs=1e-5),
            "gain": pytest.approx(base - alone, abs=1e-5),
        },
        "blend": {"loss": pytest.approx(blend, abs=1e-5), "gain": pytest.approx(base - blend, abs=1e-5)},
    }
    assert len({base, alone, blend}) == 3


def post(server: Live, path: str, **body: Any) -> dict[str, Any]:
    answer = server.http.post(path, json={**EXPLAIN, "max_tokens": 3, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_completion_is_explained_by_the_losses_of_its_prompt(server: Live) -> None:
    told = post(server, "/v1/completions", prompt=TEXT)["loramux"]
    assert [one["id"] for one in told["route"]["experts"]] == ["law", "math", "code"]
    check(told["explain"], server, TEXT, told["route"]["experts"])


def test_a_chat_is_explained_over_the_whole_templated_prompt(server: Live) -> None:
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": TEXT}]
    told = post(server, "/v1/chat/completions", messages=messages)["loramux"]
    tokens = server.http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert told["explain"]["tokens"] == len(tokens) - 1
    check(told["explain"], server, tokens, told["route"]["experts"])


def test_several_prompts_and_choices_score_each_prompt_once(server: Live) -> None:
    prompts = [TEXT, "math"]
    asked = server.engine.stats().prefill_tokens
    told = post(server, "/v1/completions", prompt=prompts, n=2, seed=1)["loramux"]
    computed = server.engine.stats().prefill_tokens - asked
    check(told["explain"], server, prompts, told["route"]["experts"])
    tokens = told["explain"]["tokens"] + len(prompts)
    assert computed <= 4 * tokens, "base, best expert, and the two choices of the blend"


def test_an_echo_brings_its_scores_and_is_explained(server: Live) -> None:
    plain = post(server, "/v1/completions", prompt=TEXT, echo=True, logprobs=1, temperature=0, routing=None)
    told = post(server, "/v1/completions", prompt=TEXT, echo=True, logprobs=1, temperature=0)
    assert told["choices"][0]["text"] == plain["choices"][0]["text"]
    scored = told["choices"][0]["logprobs"]["token_logprobs"][1:]
    tokens = told["loramux"]["explain"]["tokens"]
    blend = told["loramux"]["explain"]["blend"]["loss"]
    assert blend == pytest.approx(-sum(scored[:tokens]) / tokens, abs=1e-5)


def test_the_answer_is_the_one_without_it(server: Live) -> None:
    prompt = [int(token) for token in torch.randint(256, (50,))]
    fields = {"prompt": prompt, "temperature": 0, "logprobs": 0, "max_tokens": 8}
    plain = post(server, "/v1/completions", **{**fields, "routing": None})
    again = post(server, "/v1/completions", **fields)
    said, wanted = (one["choices"][0]["logprobs"] for one in (again, plain))
    assert said["tokens"] == wanted["tokens"]
    assert said["token_logprobs"] == pytest.approx(wanted["token_logprobs"], abs=1e-4)
    assert "explain" not in plain["loramux"]


def test_it_runs_in_one_batch_with_other_requests(server: Live) -> None:
    prompts = [[int(token) for token in torch.randint(256, (20 + 7 * i,))] for i in range(6)]
    alone = [post(server, "/v1/completions", prompt=prompt, temperature=0, logprobs=0) for prompt in prompts]
    ready = threading.Barrier(len(prompts))

    def ask(number: int) -> dict[str, Any]:
        ready.wait(10)
        return post(server, "/v1/completions", prompt=prompts[number], temperature=0, logprobs=0)

    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(ask, range(len(prompts))))
    for one, other in zip(alone, together, strict=True):
        assert one["choices"][0]["text"] == other["choices"][0]["text"]
        for mixture in ("base", "blend"):
            wanted = one["loramux"]["explain"][mixture]["loss"]
            assert other["loramux"]["explain"][mixture]["loss"] == pytest.approx(wanted, abs=1e-5)


def test_one_expert_is_its_own_best_and_the_base_has_none(server: Live) -> None:
    alone = post(server, "/v1/completions", prompt="law law")["loramux"]["explain"]
    assert alone["top1"] == {"expert": "law", **alone["blend"]}
    assert alone["blend"]["gain"] == pytest.approx(alone["base"]["loss"] - alone["blend"]["loss"])
    bare = post(server, "/v1/completions", prompt="nothing here")["loramux"]["explain"]
    assert bare["top1"] is None
    assert bare["blend"] == {"loss": bare["base"]["loss"], "gain": 0.0}
    single = post(server, "/v1/completions", prompt=[5])["loramux"]["explain"]
    assert single == {
        "tokens": 0,
        "base": {"loss": None},
        "top1": None,
        "blend": {"loss": None, "gain": None},
    }


def test_what_weighs_no_expert_is_held_against_the_base(server: Live) -> None:
    routing = {"strategy": "arrow", "explain": True}
    told = post(server, "/v1/completions", prompt=TEXT, routing=routing)["loramux"]["explain"]
    assert told["top1"] is None
    assert told["base"]["loss"] == pytest.approx(loss(server, TEXT, model=BASE)[1], abs=1e-5)
    arrow = loss(server, TEXT, model="auto", routing={"strategy": "arrow"})[1]
    assert told["blend"]["loss"] == pytest.approx(arrow, abs=1e-5)


def test_an_inexact_merge_is_held_against_the_expert_alone(server: Live) -> None:
    routing = {"merge": "svd", "explain": True}
    told = post(server, "/v1/completions", prompt=TEXT, routing=routing)["loramux"]["explain"]
    assert told["top1"]["loss"] == pytest.approx(loss(server, TEXT, model="law")[1], abs=1e-5)
    assert told["blend"]["loss"] != told["top1"]["loss"]


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_has_it_in_its_last_chunk(server: Live, path: str, usage: bool) -> None:
    chat = {"messages": [{"role": "user", "content": TEXT}]}
    asked: dict[str, Any] = chat if "chat" in path else {"prompt": TEXT}
    whole = post(server, path, **asked)["loramux"]
    body = {**EXPLAIN, **asked, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": usage}}
    lines = server.http.post(path, json=body).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    told = [chunk["loramux"] for chunk in chunks if "loramux" in chunk]
    assert "explain" not in told[0]
    assert len(told) == 2
    assert told[1]["explain"]["top1"] == pytest.approx(whole["explain"]["top1"], abs=1e-5)
    assert told[1]["route"] == told[0]["route"]
    assert chunks[-1]["loramux"] == told[1]
    assert chunks[-1]["choices"] == []
    assert ("usage" in chunks[-1]) is usage


def test_a_response_has_it_when_it_is_complete(server: Live) -> None:
    body = {**EXPLAIN, "input": TEXT, "max_output_tokens": 3}
    whole = server.http.post("/v1/responses", json=body).json()["loramux"]["explain"]
    text = server.http.post("/v1/responses", json={**body, "stream": True}).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    responses = [event["response"]["loramux"] for event in events if "response" in event]
    assert ["explain" in one for one in responses] == [False, False, True]
    assert responses[-1]["explain"]["blend"]["loss"] == pytest.approx(whole["blend"]["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"routing": {"explain": 1}}, "routing.explain"),
        ({"model": BASE}, "routing"),
        ({"lora": [{"id": "law"}]}, "routing"),
        ({"prompt": ["a"] * 16, "n": 3}, "routing.explain"),
    ],
)
def test_what_cannot_be_explained_is_refused(server: Live, body: dict[str, Any], param: str) -> None:
    answer = server.http.post("/v1/completions", json={**EXPLAIN, "prompt": "a", **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_decision_alone_explains_nothing(server: Live) -> None:
    answer = server.http.post("/v1/route", json={"input": "law", "routing": {"explain": True}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "routing.explain")


class Full(ScriptedEngine):
    """Has no place for a prompt that is only scored."""

    async def run(self, work: Work) -> AsyncGenerator[Event]:
        if work.sampling.max_tokens == 0:
            raise EngineOverloaded(7, retry_after=3)
        async for event in super().run(work):
            yield event


def test_a_full_queue_is_a_429(tmp_path: Path) -> None:
    with serving(tmp_path, engine=Full(saying(TOKENIZER, "Hello."))) as served:
        body = {"model": "auto", "prompt": "law math", "routing": {"explain": True}}
        answer = served.http.post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert answer.headers["retry-after"] == "3"
        assert served.http.post("/v1/completions", json={**body, "routing": {}}).status_code == 200


def test_a_client_that_leaves_ends_the_scoring_too(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        served.hold()
        body = {"model": "auto", "prompt": "law math", "routing": {"explain": True}, "stream": True}
        with served.http.stream("POST", "/v1/completions", json=body):
            served.wait_for(lambda: served.engine.running == 1 and len(served.engine.works) == 3)
        served.wait_for(lambda: served.engine.running == 0)
        served.wait_for(lambda: served.parts.residency.stats().pinned_bytes == 0)


def test_scores_that_fail_fail_the_request(tmp_path: Path) -> None:
    engine = ScriptedEngine(saying(TOKENIZER, "Hello."), fail_after=2, failure=EngineError("no"))
    with serving(tmp_path, engine=engine) as served:
        body = {"model": "auto", "prompt": "law math", "routing": {"explain": True}}
        assert served.http.post("/v1/completions", json=body).status_code == 500
