"""The real engine behind real routes: requests of every kind in one batch say what they say alone."""

import gc
import json
import threading
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from loramux.adapters.lora import LoraAdapter
from loramux.adapters.peft_format import write_lora
from loramux.adapters.sparse.model import SparseModel
from tests.http.live import ARROW, BLEND, LOGO, SPECTR, Live, live, random_prompt
from tests.http.serving import BASE
from tests.tiny import random_adapter
from tests.tiny_sparse import mixlora_tensors, random_mixlora, save_mixlora

KINDS: dict[str, dict[str, Any]] = {
    "blend": BLEND,
    "expert": {"model": "math"},
    "mixlora": {"model": "mix"},
    "loracoe": {"model": "coe"},
    "base": {"model": BASE},
    "loramoe": {"model": "moe"},
    "mola": {"model": "mola"},
    "arrow": ARROW,
    "spectr": SPECTR,
    "logo": LOGO,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("adapters")) as running:
        yield running


def scores(answer: dict[str, Any]) -> list[float]:
    found: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"]
    return found


def texts(answer: dict[str, Any]) -> list[str]:
    found: list[str] = answer["choices"][0]["logprobs"]["tokens"]
    return found


def test_one_batch_of_every_kind_equals_isolated_runs(server: Live) -> None:
    prompt = random_prompt(37)  # one prompt for all: cached keys and values must not cross over
    alone = {kind: server.complete(prompt, 24, **fields) for kind, fields in KINDS.items()}
    before = server.engine.stats().steps
    ready = threading.Barrier(len(KINDS))

    def ask(fields: dict[str, Any]) -> dict[str, Any]:
        ready.wait(10)
        return server.complete(prompt, 24, **fields)

    with ThreadPoolExecutor(len(KINDS)) as pool:
        together = dict(zip(KINDS, pool.map(ask, KINDS.values()), strict=True))
    steps = server.engine.stats().steps - before
    assert steps < 3 * 24, f"{steps} steps for {len(KINDS)} sequences of 24: they did not share steps"
    for kind, answer in together.items():
        assert texts(answer) == texts(alone[kind]), kind
        assert scores(answer) == pytest.approx(scores(alone[kind]), abs=1e-4), kind
    heard = [tuple(scores(answer)) for answer in alone.values()]
    assert len(set(heard)) == len(KINDS), "two kinds compute the same"
    keys = [answer["loramux"]["blend"]["key"] for answer in alone.values()]
    assert len(set(keys)) == len(KINDS)
    methods = {kind: answer["loramux"]["blend"]["method"] for kind, answer in alone.items()}
    assert methods == {
        "blend": "exact",
        "expert": "exact",
        "mixlora": "mixlora",
        "loracoe": "loracoe",
        "base": "exact",
        "loramoe": "loramoe",
        "mola": "mola",
        "arrow": "arrow",
        "spectr": "spectr",
        "logo": "exact",
    }


def test_a_shared_prefix_never_crosses_models(server: Live) -> None:
    prompt = random_prompt(64)
    fresh = {kind: server.complete(prompt, 4, **fields) for kind, fields in KINDS.items()}
    for kind, fields in KINDS.items():
        again = server.complete(prompt, 4, **fields)
        assert texts(again) == texts(fresh[kind])
        assert scores(again) == pytest.approx(scores(fresh[kind]), abs=1e-4)
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert all(a["usage"]["prompt_tokens_details"]["cached_tokens"] == 0 for a in fresh.values())


def test_expert_load_counts_tokens(server: Live) -> None:
    def taken() -> float:
        text = server.http.get("/metrics").text.splitlines()
        wanted = [line for line in text if line.startswith("loramux_sparse_expert_tokens_total")]
        return sum(float(line.split()[-1]) for line in wanted if 'model="mix"' in line)

    before = taken()
    server.complete(random_prompt(20), 5, model="mix")
    # Two experts a token, two layers; the last token is never fed back.
    assert taken() - before == 2 * 2 * (20 + 4)
    assert 'loramux_sparse_router_entropy_nats{model="coe"}' in server.http.get("/metrics").text


def saved(server: Live, name: str) -> SparseModel:
    model = random_mixlora(server.shapes, name)
    save_mixlora(model, server.root / name, BASE)
    return model


def test_load_and_unload_while_streaming(server: Live) -> None:
    saved(server, "late")
    before = server.sparse_bytes()
    loaded = server.admin("load", lora_name="late", lora_path="late")
    assert loaded.status_code == 200, loaded.text
    assert loaded.json()["kind"] == "mixlora"
    assert server.sparse_bytes() > before
    prompt = random_prompt(10)
    whole = server.complete(prompt, 100, model="late")
    body = {"model": "late", "prompt": list(prompt), "max_tokens": 100, "temperature": 0, "stream": True}
    said = ""
    with server.http.stream("POST", "/v1/completions", json={**body, "ignore_eos": True}) as stream:
        lines = stream.iter_lines()
        for line in lines:
            if line.startswith("data: {"):
                said += json.loads(line[6:])["choices"][0]["text"]
                break
        assert server.admin("unload", lora_name="late").status_code == 200
        assert server.http.post("/v1/completions", json=body).status_code == 404
        saved(server, "late")  # other weights under the same name
        assert server.admin("load", lora_name="late", lora_path="late").status_code == 200
        for line in lines:
            if line.startswith("data: {"):
                said += json.loads(line[6:])["choices"][0]["text"]
    assert said == whole["choices"][0]["text"]
    assert scores(server.complete(prompt, 8, model="late")) != scores(whole)[:8]
    assert server.admin("unload", lora_name="late").status_code == 200
    assert server.sparse_bytes() == before


def spoil(tensors: dict[str, torch.Tensor], how: str) -> str:
    """Damage a checkpoint; the tensor that must be named."""
    name = "mixlora.layers.1.mlp.down_proj.experts.3.lora_B.weight"
    match how:
        case "missing":
            del tensors[name]
        case "transposed":
            tensors[name] = tensors[name].T
        case "nan":
            tensors[name] = tensors[name] * float("nan")
        case "extra":
            name = "mixlora.layers.1.mlp.down_proj.experts.4.lora_B.weight"
            tensors[name] = torch.zeros(64, 4)
    return name


def test_bad_directories_are_refused_by_tensor_and_disturb_nobody(server: Live) -> None:
    prompt, before = random_prompt(12), server.sparse_bytes()
    alone = server.complete(prompt, 40, model="mix")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.complete, prompt, 40, model="mix")
        for how in ("missing", "transposed", "nan", "extra"):
            model = random_mixlora(server.shapes, "bad")
            tensors = mixlora_tensors(model)
            name = spoil(tensors, how)
            save_mixlora(model, server.root / "bad", BASE, tensors)
            refused = server.admin("load", lora_name="bad", lora_path="bad")
            assert refused.status_code == 400
            error = refused.json()["error"]
            assert (error["param"], error["code"]) == ("lora_path", "adapter_refused")
            assert name in error["message"]
            assert server.http.get("/v1/models/bad").status_code == 404
        beside = running.result(60)
        assert texts(beside) == texts(alone)
        assert scores(beside) == pytest.approx(scores(alone), abs=1e-4)
    assert server.sparse_bytes() == before


def test_the_operator_may_decide_about_a_model_that_is_loaded(server: Live) -> None:
    save_mixlora(random_mixlora(server.shapes, "moved"), server.root / "moved", "/home/somebody/base")
    asked = {"lora_name": "moved", "lora_path": "moved"}
    assert "/home/somebody/base" in server.admin("load", **asked).json()["error"]["message"]
    assert server.admin("load", **asked, any_base=True).status_code == 200
    assert server.admin("unload", lora_name="moved").status_code == 200
    assert server.admin("load", **asked, any_base="yes").json()["error"]["param"] == "any_base"


def test_the_memory_of_an_unloaded_model_is_freed_without_another_step(server: Live) -> None:
    saved(server, "brief")
    assert server.admin("load", lora_name="brief", lora_path="brief").status_code == 200
    tensors = tensors_of(server.parts.shelf._placed["brief"].slot)
    # The counters, which are small, stay with the slot.
    kept = [weakref.ref(tensor) for tensor in tensors if tensor.numel() > 4]
    assert sum(tensor.nbytes for tensor in tensors) > 50_000
    del tensors
    server.complete(random_prompt(5), 3, model="brief")
    assert server.admin("unload", lora_name="brief").status_code == 200
    gc.collect()
    assert [ref() for ref in kept if ref() is not None] == []


def tensors_of(owner: object) -> list[torch.Tensor]:
    """Every tensor that is reached through attributes and containers of ours."""
    found: dict[int, torch.Tensor] = {}
    seen: set[int] = set()
    todo = [owner]
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found[id(item)] = item
        elif isinstance(item, Mapping):
            todo += item.values()
        elif isinstance(item, list | tuple):
            todo += item
        elif type(item).__module__.startswith("loramux") and hasattr(item, "__dict__"):
            todo += vars(item).values()
    return list(found.values())


def test_a_plain_lora_still_loads_as_an_expert(server: Live) -> None:
    adapter: LoraAdapter = random_adapter(server.shapes, 4, "poems")
    write_lora(adapter, server.root / "poems", BASE)
    refused = server.admin("load", lora_name="poems", lora_path="poems", bypass_router=True)
    assert "bypass_router is for sparse models" in refused.json()["error"]["message"]
    assert server.admin("load", lora_name="poems", lora_path="poems").json()["kind"] == "lora"
    assert server.complete(random_prompt(5), 3, model="poems")["loramux"]["blend"]["method"] == "exact"
    assert server.admin("unload", lora_name="poems").status_code == 200
