"""Strategies that ask the experts, over the engine that computes: LoGo's signals, and each by default."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.http.live import ARROW, LOGO, SPECTR, Live, live, random_prompt
from tests.http.serving import BASE, EXPERTS, serving

TEXT = "law math code"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("adapters")) as running:
        yield running


def heard(server: Live, prompt: tuple[int, ...]) -> Tensor:
    """What the last block's query projection reads of the last token, in float64."""
    served = server.engine._model
    weights = {name.replace(".base.", "."): weight for name, weight in served.state_dict().items()}
    config = copy.deepcopy(served.config)
    config._attn_implementation = "eager"
    model = type(served)(config)
    model.load_state_dict(weights)
    model.double().eval()
    reads: list[Tensor] = []
    block = model.get_submodule("model.layers.1.self_attn.q_proj")
    block.register_forward_pre_hook(lambda _, given: reads.append(given[0]))
    with torch.inference_mode():
        model(torch.tensor([prompt]), use_cache=False)
    return reads[0][0, -1]


def signals(server: Live, prompt: tuple[int, ...], signal: str) -> dict[str, float]:
    x, found = heard(server, prompt), {}
    for id, expert in server.parts.residency.experts.items():
        output = expert.delta("model.layers.1.self_attn.q_proj") @ x
        shares = output.softmax(0)
        found[id] = float(output.norm() if signal == "norm" else 1 / -(shares * shares.log()).sum())
    return found


def samples(server: Live, name: str) -> float:
    lines = [line for line in server.http.get("/metrics").text.splitlines() if line.startswith(name)]
    return float(lines[0].split()[-1]) if lines else 0.0


@pytest.mark.parametrize("signal", ["norm", "entropy"])
@pytest.mark.parametrize("top_m", [1, 2, 16])
@pytest.mark.parametrize("length", [1, 5, 200])  # a chunk is 128 tokens
def test_logo_weighs_by_the_experts_signals(server: Live, signal: str, top_m: int, length: int) -> None:
    prompt = random_prompt(length)
    routing = {"strategy": "logo", "top_m": top_m, "signal": signal}
    told = server.complete(prompt, 3, model="auto", routing=routing)["loramux"]
    wanted = signals(server, prompt, signal)
    best = sorted(wanted, key=lambda id: -wanted[id])[:top_m]
    experts = told["route"]["experts"]
    assert [one["id"] for one in experts] == best
    total = sum(wanted[id] for id in best)
    for one in experts:
        assert one["score"] == pytest.approx(wanted[one["id"]], rel=1e-3)
        assert one["weight"] == pytest.approx(wanted[one["id"]] / total, abs=0.0051)
        assert (one["similarity"], one["probability"]) == (None, None)
    assert (told["route"]["strategy"], told["route"]["fallback"]) == ("logo", False)
    assert told["blend"]["method"] == "exact"


def test_a_blend_of_logo_is_the_mixture_that_it_names(server: Live) -> None:
    prompt = random_prompt(30)
    answer = server.complete(prompt, 12, **LOGO)
    given = [{"id": one["id"], "scale": one["weight"]} for one in answer["loramux"]["route"]["experts"]]
    same = server.complete(prompt, 12, model="auto", lora=given)
    assert answer["choices"][0]["text"] == same["choices"][0]["text"]
    merged = {"strategy": "logo", "merge": "svd"}
    assert server.complete(prompt, 2, model="auto", routing=merged)["loramux"]["blend"]["method"] == "svd"


def test_a_prompt_is_asked_once_and_shares_the_bases_pages(server: Live) -> None:
    prompt, count = random_prompt(64), 'loramux_route_seconds_count{stage="probe"}'
    server.complete(prompt, 1, model=BASE)
    before, hits = samples(server, count), samples(server, "loramux_prefix_hit_tokens_total")
    first = server.complete(prompt, 1, **LOGO)["loramux"]
    assert samples(server, "loramux_prefix_hit_tokens_total") >= hits + 56
    again = server.complete(prompt, 1, **LOGO)["loramux"]
    assert again["route"] == first["route"]
    assert again["blend"]["cached"]
    assert samples(server, count) == before + 1
    server.complete(prompt, 1, model="auto", routing={"strategy": "logo", "signal": "entropy"})
    assert samples(server, count) == before + 2


def test_logo_streams_and_explains(server: Live) -> None:
    body = {**LOGO, "messages": [{"role": "user", "content": TEXT}], "max_tokens": 3, "stream": True}
    body["routing"] = {"strategy": "logo", "top_m": 2, "explain": True}
    text = server.http.post("/v1/chat/completions", json=body).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert chunks[0]["loramux"]["route"]["strategy"] == "logo"
    best = chunks[0]["loramux"]["route"]["experts"][0]["id"]
    assert chunks[-1]["loramux"]["explain"]["top1"]["expert"] == best


def test_experts_come_and_go(server: Live) -> None:
    prompt = random_prompt(9)
    taken = server.parts.residency.experts["math"]
    server.parts.residency.remove_expert("math")
    try:
        for kind in (ARROW, SPECTR, {**LOGO, "routing": {"strategy": "logo", "top_m": 3}}):
            told = server.complete(prompt, 1, **kind)["loramux"]["route"]["experts"]
            assert {one["id"] for one in told} == {"code", "law"}
    finally:
        server.parts.residency.add_expert(taken)
    told = server.complete(prompt, 1, model="auto", routing={"strategy": "logo", "top_m": 3})["loramux"]
    assert {one["id"] for one in told["route"]["experts"]} == set(EXPERTS)


def test_several_prompts_are_refused_by_logo(server: Live) -> None:
    answer = server.http.post("/v1/completions", json={**LOGO, "prompt": ["a", "b"]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def test_an_engine_that_cannot_be_listened_to_says_so(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        answer = served.http.post("/v1/completions", json={**LOGO, "prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "routing.strategy")
        assert "engine" in answer.json()["error"]["message"]


def test_a_pool_without_experts_is_the_base(tmp_path: Path) -> None:
    with serving(tmp_path, routing={"strategy": "logo"}, admin_key="admin") as served:
        for name in EXPERTS:
            served.on_loop(lambda name=name: served.parts.residency.remove_expert(name))  # type: ignore[misc]
        for strategy in ("logo", "spectr", "arrow"):
            body = {"model": "auto", "prompt": "a", "routing": {"strategy": strategy}}
            route = served.http.post("/v1/completions", json=body).json()["loramux"]["route"]
            assert (route["strategy"], route["fallback"], route["experts"]) == (strategy, True, [])


@pytest.mark.parametrize("strategy", ["arrow", "spectr"])
def test_tokens_may_choose_by_default(tmp_path: Path, strategy: str) -> None:
    with serving(tmp_path, routing={"strategy": strategy, "top_m": 2}) as served:
        told = served.chat("law").model_dump()["loramux"]
        assert (told["route"]["strategy"], told["blend"]["method"]) == (strategy, strategy)
        slot: Any = served.engine.works[-1].adapter
        assert slot.slot[1] == 2
        assert served.router.asked == []
        routed = served.chat("law", extra_body={"routing": {"strategy": "hybrid", "policy": "softmax"}})
        assert routed.model_dump()["loramux"]["route"]["experts"][0]["id"] == "law"
        body = {"model": "auto", "prompt": "a", "routing": {"threshold": 0.5}}
        error = served.http.post("/v1/completions", json=body).json()["error"]
        assert error["param"] == "routing.threshold"
        assert strategy in error["message"]
        shown = served.http.post("/v1/route", json={"input": "law"}).json()["error"]
        assert shown["param"] == "routing.strategy"
        assert "hybrid" in shown["message"]
        asked = {"input": "law", "routing": {"strategy": "hybrid"}}
        assert served.http.post("/v1/route", json=asked).json()["experts"][0]["id"] == "law"


def test_logo_may_be_the_servers_own(tmp_path: Path) -> None:
    with live(tmp_path, routing={"strategy": "logo", "top_m": 1}) as server:
        told = server.complete(random_prompt(7), 2, model="auto")["loramux"]["route"]
        assert (told["strategy"], len(told["experts"])) == ("logo", 1)
        error = server.http.post("/v1/route", json={"input": "law"}).json()["error"]
        assert "whole prompt" in error["message"]
