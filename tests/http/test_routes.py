"""The routes beside the two that generate."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.http.serving import BASE, EXPERTS, TOKENIZER, Served, serving

ADMIN = {"authorization": "Bearer admin"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("pool"), admin_key="admin") as running:
        yield running


def test_route_gives_the_whole_decision_and_generates_nothing(served: Served) -> None:
    started = len(served.engine.works)
    answer = served.http.post("/v1/route", json={"input": "law law math"}).json()
    assert [expert["id"] for expert in answer["experts"]] == ["law", "math"]
    assert {candidate["id"] for candidate in answer["candidates"]} == set(EXPERTS)
    assert answer["reason"]
    assert not answer["fallback"]
    chat = {"messages": [{"role": "user", "content": "law law math"}], "routing": {"top_m": 1}}
    assert len(served.http.post("/v1/route", json=chat).json()["experts"]) == 1
    assert len(served.engine.works) == started


def test_truncation_is_said(served: Served) -> None:
    served.router.truncate_after = 10
    try:
        answer = served.chat("math " * 5).model_dump()["loramux"]["route"]
        assert answer["truncated"]
        assert served.metric("loramux_route_truncated_total") == 1
    finally:
        served.router.truncate_after = 1_000


def test_tokenize_and_back(served: Served) -> None:
    answer = served.http.post("/tokenize", json={"prompt": "the é", "return_token_strs": True}).json()
    assert answer["tokens"] == TOKENIZER("the é")["input_ids"]
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 512
    assert answer["token_strs"][0] == "the"
    assert served.http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "the é"}
    chat = {"messages": [{"role": "user", "content": "a"}], "return_token_strs": True}
    strings = served.http.post("/tokenize", json=chat).json()["token_strs"]
    assert strings == ["<|bos|>", "<|user|>", "a", "<|end|>", "<|assistant|>"]


def test_probes_and_the_page(served: Served) -> None:
    assert served.http.get("/health").json() == {"status": "ok"}
    assert served.http.get("/ready").json() == {"status": "ready"}
    page = served.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "://" not in page.text


@pytest.mark.parametrize("given", ["abc-123", "a" * 128])
def test_a_harmless_request_id_comes_back(served: Served, given: str) -> None:
    assert served.http.get("/health", headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a" * 129, "a b", "<script>", "a;b"])
def test_any_other_request_id_is_replaced(served: Served, given: str) -> None:
    sent = served.http.get("/health", headers={"x-request-id": given}).headers["x-request-id"]
    assert sent.startswith("req-")


def samples(served: Served) -> dict[str, float]:
    families = text_string_to_metric_families(served.http.get("/metrics").text)
    return {
        sample.name + "".join(f"|{key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_add_up(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        served.chat("math", n=2)
        served.chat("weather")
        list(served.chat("law", stream=True))
        served.client.completions.create(model=BASE, prompt="a", max_tokens=2)
        assert served.http.post("/v1/completions", json={"model": "x", "prompt": "a"}).status_code == 404
        served.http.get("/no/such/path")
        found = samples(served)
    assert found["loramux_requests_total|outcome=finished"] == 4
    assert found[f"vllm:request_success_total|finished_reason=stop|model_name={BASE}"] == 4
    assert found[f"vllm:request_success_total|finished_reason=length|model_name={BASE}"] == 1
    assert found["loramux_generation_tokens_total"] == 4 * 13 + 2
    assert found[f"vllm:generation_tokens_total|model_name={BASE}"] == 4 * 13 + 2
    for name in ("time_to_first_token", "queue", "request_duration", "prefill", "decode"):
        assert found[f"loramux_{name}_seconds_count"] == 4
    assert found["loramux_inter_token_seconds_count"] == 4 * 12 + 1
    assert found["loramux_route_decisions_total|outcome=routed"] == 2
    assert found["loramux_route_decisions_total|outcome=fallback"] == 1
    assert found["loramux_route_decisions_total|outcome=named"] == 1
    assert found["loramux_expert_selected_total|expert=math"] == 1
    assert found["loramux_route_nearest_total|expert=math|outcome=routed"] == 1
    # Nothing in "weather" is any expert's; the first of equals is the nearest.
    assert found["loramux_route_nearest_total|expert=code|outcome=fallback"] == 1
    assert found["loramux_merge_rank_sum|method=exact"] == 8
    assert found["loramux_inference_seconds_count"] == 4
    assert found["loramux_ready"] == 1
    assert found["loramux_merge_cache_misses_total"] == 2
    assert found["loramux_merge_seconds_count|method=exact"] == 2
    assert found["loramux_residency_bytes|tier=used"] > 0
    assert found["loramux_residency_bytes|tier=pinned"] == 0
    assert found["loramux_http_requests_total|method=POST|route=/v1/chat/completions|status=200"] == 3
    assert found["loramux_http_requests_total|method=POST|route=/v1/completions|status=404"] == 1
    assert found["loramux_http_requests_total|method=GET|route=unmatched|status=404"] == 1


def test_running_and_waiting_experts_are_in_the_gateway_gauge(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        served.hold()
        with served.http.stream(
            "POST", "/v1/completions", json={"model": "law", "prompt": "a", "stream": True}
        ):
            served.wait_for(lambda: served.engine.running == 1)
            info = [name for name in samples(served) if name.startswith("vllm:lora_requests_info")]
            assert info == [
                "vllm:lora_requests_info|max_lora=16|running_lora_adapters=law|waiting_lora_adapters="
            ]
            assert samples(served)[f"vllm:num_requests_running|model_name={BASE}"] == 1
            served.release()


def test_metrics_can_be_turned_off(tmp_path: Path) -> None:
    with serving(tmp_path, metrics=False) as served:
        assert served.http.get("/metrics").status_code == 404


def post(served: Served, action: str, **body: Any) -> httpx.Response:
    return served.http.post(f"/v1/{action}_lora_adapter", json=body, headers=ADMIN)


def listed(served: Served) -> list[str]:
    answer = served.http.get("/v1/lora_adapters", headers=ADMIN).json()
    return [entry["id"] for entry in answer["data"]]


def test_an_adapter_is_loaded_used_and_unloaded(tmp_path: Path) -> None:
    folder = tmp_path / "adapters" / "poems"
    folder.mkdir(parents=True)
    (folder / "ok").touch()
    with serving(tmp_path, admin_key="admin") as served:
        assert post(served, "load", lora_name="poems", lora_path="poems").json()["id"] == "poems"
        assert listed(served) == ["code", "law", "math", "poems"]
        assert "poems" in [model.id for model in served.client.models.list()]
        served.chat("a", model="poems")
        assert served.engine.works[-1].adapter is not None
        again = post(served, "load", lora_name="poems", lora_path="poems")
        assert again.status_code == 409
        assert again.json()["error"]["param"] == "lora_name"
        served.hold()
        with served.http.stream(
            "POST", "/v1/completions", json={"model": "poems", "prompt": "a", "stream": True}
        ) as last:
            served.wait_for(lambda: served.engine.running == 1)
            assert post(served, "unload", lora_name="poems").json() == {"id": "poems", "unloaded": True}
            served.release()
            assert "[DONE]" in last.read().decode()
        assert listed(served) == ["code", "law", "math"]
        assert post(served, "unload", lora_name="poems").status_code == 404
        assert served.http.post("/v1/completions", json={"model": "poems", "prompt": "a"}).status_code == 404


def test_traffic_of_an_expert_that_is_gone_once_went_to_the_others_or_to_its_namesake(tmp_path: Path) -> None:
    folder = tmp_path / "adapters" / "poems"
    folder.mkdir(parents=True)
    (folder / "ok").touch()
    with serving(tmp_path, admin_key="admin") as served:

        def experts(text: str) -> list[tuple[str, float]]:
            shown = served.http.post("/v1/route", json={"input": text}).json()
            used = served.chat(text).model_dump()["loramux"]["route"]
            assert shown["fallback"] == used["fallback"]
            listed = [(one["id"], round(one["weight"], 2)) for one in used["experts"]]
            assert listed == [
                (one["id"], round(one["weight"], 2)) for one in shown["experts"] if one["weight"]
            ]
            return listed

        assert experts("law law math") == [("law", 0.67), ("math", 0.33)]
        post(served, "unload", lora_name="law")
        assert experts("law") == []
        assert experts("law law math") == [("math", 1.0)]
        # Another content under the name gets none of its traffic, and says so.
        assert post(served, "load", lora_name="law", lora_path="poems").json()["routable"] is False
        assert experts("law") == []
        cards = {card["id"]: card for card in served.http.get("/v1/models").json()["data"]}
        assert cards["law"]["loramux"] == {"routable": False}
        assert cards["math"]["loramux"] == {"routable": True, "route_from": "pool"}
        assert served.metric("loramux_routable_experts") == 2
        assert served.chat("law", model="law").choices
        # Content that the router knows has its route back, under whatever name.
        post(served, "unload", lora_name="law")
        (folder.parent / "law").mkdir()
        (folder.parent / "law" / "ok").touch()
        back = post(served, "load", lora_name="statutes", lora_path="law").json()
        assert (back["routable"], back["route_from"]) == (True, "pool")
        assert served.metric("loramux_routable_experts") == 3
        assert experts("law law math") == [("statutes", 0.67), ("math", 0.33)]


def test_the_router_may_know_an_expert_that_was_unloaded(tmp_path: Path) -> None:
    with serving(tmp_path, admin_key="admin") as served:
        post(served, "unload", lora_name="law")
        mixed = served.chat("law math").model_dump()["loramux"]["route"]
        assert [(expert["id"], expert["weight"]) for expert in mixed["experts"]] == [("math", 1.0)]
        assert served.chat("law").model_dump()["loramux"]["route"]["fallback"]


@pytest.mark.parametrize(
    "path",
    ["../outside", "/etc", "poems/../../outside", "link", "", ".", "absent", "a\u0000b", "..\\outside", "file:///etc",
     "https://host/adapter", "x" * 1000, "owner/../../name"],
)  # fmt: skip
def test_paths_stay_below_the_root(tmp_path: Path, served: Served, path: str) -> None:
    root = served.parts.admin._root
    outside = root.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "ok").touch()
    root.mkdir(exist_ok=True)
    if not (root / "link").exists():
        (root / "link").symlink_to(outside)
    answer = post(served, "load", lora_name="poems", lora_path=path)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "lora_path"
    assert listed(served) == ["code", "law", "math"]


def test_an_adapter_that_is_refused_leaves_nothing_behind(tmp_path: Path, served: Served) -> None:
    (served.parts.admin._root / "broken").mkdir(parents=True, exist_ok=True)
    answer = post(served, "load", lora_name="poems", lora_path="broken")
    assert answer.status_code == 400
    assert "adapter_config.json is missing" in answer.json()["error"]["message"]
    assert listed(served) == ["code", "law", "math"]


@pytest.mark.parametrize("name", ["auto", BASE, "math"])
def test_taken_names_are_a_conflict(served: Served, name: str) -> None:
    assert post(served, "load", lora_name=name, lora_path="x").status_code == 409


@pytest.mark.parametrize("name", ["", "Upper", "a b", "../a", "-a", "a" * 65])
def test_names_are_slugs(served: Served, name: str) -> None:
    assert post(served, "load", lora_name=name, lora_path="x").json()["error"]["param"] == "lora_name"
