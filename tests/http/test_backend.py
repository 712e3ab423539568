"""The whole server in front of a fake vLLM: what clients see, and what stops the start."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from loramux.server.assemble import assemble
from loramux.server.backend.engine import RemoteEngine
from loramux.server.backend.settings import BackendSettings
from loramux.server.errors import StartError
from loramux.server.parts import Parts
from loramux.server.settings import Settings, load_settings
from tests.backend_kit import Oracle
from tests.fake_vllm import BLOCK, FakeVllm
from tests.fake_vllm import listening as faking
from tests.http.serving import listening
from tests.kit import DEMO_POOL

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
ADMIN = {"authorization": "Bearer admin"}
MIXTURE = {"select-table": 0.6, "movie-song": 0.4}
LORA = [{"id": name, "scale": scale} for name, scale in MIXTURE.items()]
BASE = "loramux-demo-base"


def settings(url: str, place: Path, **backend: Any) -> Settings:
    chosen = {"urls": url, "folder": place / "blends", "max_lora_rank": 32, **backend}
    return load_settings(
        flags={
            "pool": DEMO_POOL,
            "verify_pool": False,
            "admin_key": "admin",
            "drain_seconds": 2,
            "backend": chosen,
        }
    )


@dataclass
class Front:
    """A server of ours and the one behind it."""

    http: httpx.Client
    fake: FakeVllm
    parts: Parts

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def complete(self, **body: Any) -> dict[str, Any]:
        answer = self.post("/v1/completions", **{"max_tokens": 4, "temperature": 0, **body})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    fake = FakeVllm(DEMO_POOL / "base")
    with ExitStack() as stack:
        url = stack.enter_context(faking(fake))
        parts = assemble(settings(url, tmp_path_factory.mktemp("front")))
        ours, _ = stack.enter_context(listening(parts))
        yield Front(stack.enter_context(httpx.Client(base_url=ours, timeout=120)), fake, parts)


def test_a_mixture_answers_as_peft_computes_it(front: Front) -> None:
    asked = {"prompt": "SELECT name", "logprobs": 2, "echo": True, "max_tokens": 5, "ignore_eos": True}
    answer = front.complete(model=BASE, lora=LORA, **asked)
    (choice,) = answer["choices"]
    oracle = Oracle(DEMO_POOL / "base", {name: DEMO_POOL / "experts" / name for name in MIXTURE})
    prompt = front.post("/tokenize", model=BASE, prompt="SELECT name").json()["tokens"]
    ids = list(prompt)
    for _ in range(5):
        ids.append(int(oracle.logprobs(MIXTURE, ids)[-1].argmax()))
    rows = oracle.logprobs(MIXTURE, ids)
    expected = [float(row[id]) for row, id in zip(rows[:-1], ids[1:], strict=True)]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    for table, row in zip(choice["logprobs"]["top_logprobs"][1:], rows[:-1], strict=True):
        assert sorted(table.values()) == pytest.approx(sorted(torch.topk(row, 2).values.tolist()), abs=1e-4)
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["usage"]["completion_tokens"] == 5
    blend = answer["loramux"]["blend"]
    assert (blend["method"], blend["rank"], blend["relative_error"]) == ("exact", 16, 0.0)


def test_a_chat_is_routed_and_streams_what_it_answers_at_once(front: Front) -> None:
    messages = [{"role": "user", "content": "What is the name of the song in the movie?"}]
    body = {"model": "auto", "messages": messages, "temperature": 0, "max_tokens": 5}
    whole = front.post("/v1/chat/completions", **body)
    assert whole.status_code == 200
    assert whole.headers["x-loramux-experts"]
    assert whole.json()["loramux"]["route"]["experts"]
    text = ""
    with front.http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
        chunks = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    for chunk in chunks:
        text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
    assert text == whole.json()["choices"][0]["message"]["content"]
    assert chunks[0]["loramux"]["blend"]["cached"] is True


def test_what_needs_our_operators_is_refused_with_the_reason(front: Front) -> None:
    sparse = front.post("/v1/completions", model="demo-mixlora", prompt="a")
    assert sparse.status_code == 400
    assert "no backend knows" in sparse.json()["error"]["message"]
    for strategy in ("arrow", "spectr", "logo"):
        answer = front.post("/v1/completions", model="auto", prompt="a", routing={"strategy": strategy})
        assert answer.status_code == 400
        assert "inside the base" in answer.json()["error"]["message"]
    names = [card["id"] for card in front.http.get("/v1/models").json()["data"]]
    assert "demo-mixlora" not in names
    assert "movie-song" in names


def test_a_sparse_model_cannot_be_loaded_and_an_expert_can(front: Front, tmp_path: Path) -> None:
    root = front.parts.admin._root
    front.parts.admin._root = DEMO_POOL
    try:
        refused = front.http.post(
            "/v1/load_lora_adapter",
            json={"lora_name": "m", "lora_path": "sparse/demo-mixlora"},
            headers=ADMIN,
        )
        assert refused.status_code == 400
        assert "no backend knows" in refused.json()["error"]["message"]
        loaded = front.http.post(
            "/v1/load_lora_adapter",
            json={"lora_name": "twin", "lora_path": "experts/true-false"},
            headers=ADMIN,
        )
        assert loaded.status_code == 200, loaded.text
    finally:
        front.parts.admin._root = root
    one = front.complete(model="twin", prompt="Is it true")
    assert one["choices"] == front.complete(model="true-false", prompt="Is it true")["choices"]
    gone = front.http.post("/v1/unload_lora_adapter", json={"lora_name": "twin"}, headers=ADMIN)
    assert gone.status_code == 200


def test_a_backend_that_is_gone_is_a_503_that_names_it_and_comes_back(front: Front) -> None:
    front.fake.refuse = 503
    answer = front.post("/v1/completions", model=BASE, prompt="a", lora=LORA)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "backend_down"
    assert answer.headers["retry-after"]
    assert "backend http://127.0.0.1:" in answer.json()["error"]["message"]
    front.fake.refuse = None
    front.fake.restart()
    assert front.complete(model=BASE, prompt="a", lora=LORA)["choices"]


def test_ready_says_no_while_every_backend_is_down(tmp_path: Path) -> None:
    """And says why, though nobody has asked for an answer; back on the same port it is taken in again."""
    fakes = [FakeVllm(DEMO_POOL / "base"), FakeVllm(DEMO_POOL / "base")]
    first, second = ExitStack(), ExitStack()
    urls = [first.enter_context(faking(fakes[0])), second.enter_context(faking(fakes[1]))]
    port = int(urls[1].rpartition(":")[2])
    with first, second:
        parts = assemble(settings(",".join(urls), tmp_path))
        assert isinstance(parts.engine, RemoteEngine)
        parts.engine._patience = 0.02
        with listening(parts) as (ours, _), httpx.Client(base_url=ours, timeout=60) as http:
            assert http.get("/ready").status_code == 200
            first.close()
            settled(lambda: parts.engine._fleet.members[0].down is not None)
            assert http.get("/ready").status_code == 200
            second.close()
            settled(lambda: http.get("/ready").status_code == 503)
            error = http.get("/ready").json()["error"]
            assert error["code"] == "not_ready"
            assert all(f"backend {url}: " in error["message"] for url in urls)
            assert "loramux_ready 0.0" in http.get("/metrics").text
            assert http.get("/health").status_code == 200
            asked = {"model": BASE, "prompt": "a", "max_tokens": 2}
            assert http.post("/v1/completions", json=asked).status_code == 503
            with faking(fakes[1], port):
                settled(lambda: http.get("/ready").status_code == 200)
                assert "loramux_ready 1.0" in http.get("/metrics").text
                assert http.post("/v1/completions", json=asked).status_code == 200


def test_a_stream_that_a_lost_backend_leaves_goes_on_at_the_other(tmp_path: Path) -> None:
    fakes = [FakeVllm(DEMO_POOL / "base"), FakeVllm(DEMO_POOL / "base")]
    with ExitStack() as stack:
        urls = [stack.enter_context(faking(fake)) for fake in fakes]
        parts = assemble(settings(",".join(urls), tmp_path))
        ours, _ = stack.enter_context(listening(parts))
        http = stack.enter_context(httpx.Client(base_url=ours, timeout=120))
        asked = {"model": BASE, "prompt": "SELECT name", "lora": LORA, "max_tokens": 12, "ignore_eos": True}

        def streamed(**fields: Any) -> tuple[str, list[str | None], list[dict[str, Any]]]:
            body = {**asked, "temperature": 0, "stream": True, **fields}
            lines = http.post("/v1/completions", json=body).text.splitlines()
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            choices = [choice for event in events for choice in event.get("choices", ())]
            errors = [event["error"] for event in events if "error" in event]
            return "".join(one["text"] for one in choices), [one["finish_reason"] for one in choices], errors

        expected = streamed()
        home = next(fake for fake in fakes if ("load", fake.bodies[-1]["model"]) in fake.calls)
        home.break_after = 5
        assert streamed() == expected
        assert expected[1][-1] == "length"
        # vLLM would draw other tokens than the seed had: that is an error, and says so.
        for fake in fakes:
            fake.break_after = 5
        (error,) = streamed(temperature=1.0, seed=7)[2]
        assert error["code"] == "backend_down"


def test_usage_has_the_cached_tokens_of_the_backend(front: Front) -> None:
    body = {"model": BASE, "prompt": "How many tokens of this prompt are known already?", "lora": LORA}
    first, again = (front.complete(**body)["usage"] for _ in range(2))
    known = again["prompt_tokens_details"]["cached_tokens"]
    assert first["prompt_tokens_details"]["cached_tokens"] < known < again["prompt_tokens"]
    assert known % BLOCK == 0


def settled(condition: Callable[[], bool]) -> None:
    """Ask until it holds."""
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until


def test_a_backend_whose_engine_is_dead_is_down(front: Front) -> None:
    """Its HTTP side answers, but not that it lives."""
    assert isinstance(front.parts.engine, RemoteEngine)
    fleet = front.parts.engine._fleet
    front.fake.refuse = 503
    try:
        answer = front.post("/v1/completions", model=BASE, prompt="a")
        assert answer.status_code == 503
        assert "503" in (fleet.stalled() or "")
        assert "no backend can be used" in front.http.get("/ready").json()["error"]["message"]
    finally:
        front.fake.refuse = None
    front.complete(model=BASE, prompt="a")
    assert front.http.get("/ready").status_code == 200


def test_the_context_is_the_smaller_of_both(front: Front) -> None:
    card = front.http.get(f"/v1/models/{BASE}").json()
    assert card["max_model_len"] == front.fake.max_model_len


def test_metrics_tell_of_the_blends_on_the_disk(front: Front) -> None:
    front.complete(model=BASE, prompt="a", lora=LORA)
    text = front.http.get("/metrics").text
    values = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line[:1] != "#"}
    assert values['loramux_residency_bytes{tier="used"}'] > 10_000
    assert values["loramux_resident_blends"] >= 1
    assert values["loramux_engine_decode_tokens_total"] >= 4


@pytest.mark.parametrize(
    ("fields", "backend", "message"),
    [
        ({"updating": False}, {}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        ({"max_lora_rank": 16}, {}, "set backend.max_lora_rank to its --max-lora-rank"),
        ({}, {"folder_there": "/elsewhere"}, "backend.folder_there"),
        ({}, {"max_lora_rank": 1, "too_wide": "refuse"}, "has rank 8 and the backends take 1"),
        (
            {"name": "other", "root": "/models/other"},
            {},
            "start it with --served-model-name loramux-demo-base",
        ),
    ],
    ids=["no updating", "rank", "unseen folder", "too wide", "another base"],
)
def test_what_will_not_do_stops_the_start(
    tmp_path: Path, fields: dict[str, Any], backend: dict[str, Any], message: str
) -> None:
    fake = FakeVllm(DEMO_POOL / "base", **fields)
    with faking(fake) as url, pytest.raises(StartError, match=message):
        assemble(settings(url, tmp_path, **backend))


@pytest.mark.parametrize("strategy", ["arrow", "spectr", "logo"])
def test_a_strategy_that_asks_the_experts_stops_the_start(tmp_path: Path, strategy: str) -> None:
    chosen = load_settings(
        flags={"routing": {"strategy": strategy}, "backend": {"urls": "http://127.0.0.1:9"}}
    )
    with pytest.raises(StartError, match=f"routing.strategy {strategy} asks the experts"):
        assemble(chosen)


def test_another_base_is_seen_by_its_shape(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((DEMO_POOL / "base" / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": 512}))
    fake = FakeVllm(DEMO_POOL / "base", root=str(other))
    with faking(fake) as url, pytest.raises(StartError, match="has hidden_size 512, not 256"):
        assemble(settings(url, tmp_path))


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://a", "http://", "http://a?x=1", "http://a,http://a/"]
)
def test_addresses_are_checked(url: str) -> None:
    with pytest.raises(ValueError, match=r"is not like http://host:port|named twice"):
        BackendSettings(urls=url)  # type: ignore[arg-type]
