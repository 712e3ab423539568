"""The demo pool over HTTP: what the first user sees, and whether it is true."""

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import AsyncOpenAI
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.sparse.read import read_sparse
from loramux.server.pool.experts import read_experts
from loramux.server.pool.manifest import read_pool
from tests.e2e.conftest import Server
from tests.unit.adapters.training.scripts import scripted

PROMPTS = [
    "What is the total number of points when the driver is Ayrton Senna?",
    "Find all .log files larger than 10 megabytes in /var and delete them",
    "Why was my card payment declined?",
    "A baker makes 24 rolls an hour. How many rolls does she make in 7 hours?",
]


@pytest.fixture(scope="module")
def base(pool_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(pool_dir / "base", dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def tokenizer(pool_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(pool_dir / "base")


@pytest.fixture(scope="module")
def experts(pool_dir: Path, base: Any) -> dict[str, LoraAdapter]:
    pool = read_pool(pool_dir)
    return read_experts(pool, BaseShapes.from_model(base, pool.manifest.base.id))


def mixtures(names: list[str]) -> list[dict[str, float]]:
    a, b, c = names[:3]
    return [{}, {a: 1.0}, {a: 0.6, b: 0.4}, {a: 0.5, b: -0.25, c: 0.75}, {c: 1.7}]


def scored(server: Server, model: str, text: str, mixture: dict[str, float]) -> list[float]:
    """Log-probabilities of the prompt's own tokens, from the second one on."""
    lora = {"lora": [{"id": name, "scale": weight} for name, weight in mixture.items()]} if mixture else {}
    answer = server.post(
        "/v1/completions", model=model, prompt=text, echo=True, logprobs=0, max_tokens=0, **lora
    )
    assert answer["loramux"]["blend"]["relative_error"] == 0
    logprobs: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
    return logprobs


def own_logprobs(model: Any, tokenizer: Any, text: str) -> list[float]:
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)
    return [float(logprobs[i, token]) for i, token in enumerate(ids[0, 1:])]


def test_auto_routes_answers_and_says_so(server: Server) -> None:
    response = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={
            "model": "auto",
            "max_tokens": 24,
            "temperature": 0,
            "messages": [{"role": "user", "content": PROMPTS[0]}],
        },
        timeout=60,
    )
    answer = response.json()
    assert response.status_code == 200
    assert answer["choices"][0]["message"]["content"].strip()
    route = answer["loramux"]["route"]
    assert route["strategy"] == "hybrid"
    assert not route["fallback"]
    first = route["experts"][0]
    assert 0 < first["weight"] <= 1
    assert -1 <= first["similarity"] <= 1
    assert 0 <= first["probability"] <= 1
    assert response.headers["x-loramux-experts"].startswith(f"{first['id']}=")


def test_mixtures_over_http_equal_a_float64_sum(
    server: Server, base: Any, tokenizer: Any, experts: dict[str, LoraAdapter]
) -> None:
    model_id = read_pool(Path(base.config._name_or_path).parent).manifest.base.id
    original = {name: parameter.clone() for name, parameter in base.state_dict().items()}
    for mixture in mixtures(list(experts)):
        for path, module in base.named_modules():
            deltas = [w * experts[n].delta(path) for n, w in mixture.items() if path in experts[n].pairs]
            if deltas:
                module.weight.data = original[f"{path}.weight"] + sum(deltas)
        for text in PROMPTS[:2]:
            expected = own_logprobs(base, tokenizer, text)
            actual = scored(server, model_id, text, mixture)
            assert actual == pytest.approx(expected, abs=2e-4)
        base.load_state_dict(original)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_mixtures_over_http_equal_pefts_concatenation(
    server: Server, pool_dir: Path, tokenizer: Any, experts: dict[str, LoraAdapter]
) -> None:
    """An oracle that shares no code with us: PEFT reads the same files and concatenates them itself."""
    plain = AutoModelForCausalLM.from_pretrained(pool_dir / "base", dtype=torch.float32)
    manifest = read_pool(pool_dir).manifest
    paths = {entry.id: pool_dir / entry.path for entry in manifest.experts}
    first, second = list(experts)[:2]
    model = PeftModel.from_pretrained(plain, paths[first], adapter_name="one")
    model.load_adapter(paths[second], adapter_name="two")
    model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "both", combination_type="cat")
    model.set_adapter("both")
    model.eval()
    for text in PROMPTS[2:]:
        actual = scored(server, manifest.base.id, text, {first: 0.7, second: 0.3})
        assert actual == pytest.approx(own_logprobs(model, tokenizer, text), abs=5e-4)


def test_sixteen_interleaved_streams_equal_their_isolated_runs(
    server: Server, experts: dict[str, Any]
) -> None:
    pairs = zip(itertools.cycle(PROMPTS), itertools.cycle(mixtures(list(experts))), strict=False)
    jobs = list(itertools.islice(pairs, 16))

    async def stream(client: AsyncOpenAI, text: str, mixture: dict[str, float]) -> str:
        lora = {"lora": [{"id": name, "scale": weight} for name, weight in mixture.items()]}
        chunks = await client.chat.completions.create(
            model="auto",
            messages=[{"role": "user", "content": text}],
            max_tokens=32,
            temperature=0,
            stream=True,
            extra_body=lora if mixture else {"routing": {"top_m": 2}},
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks if chunk.choices])

    async def scenario() -> tuple[list[str], list[str]]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            alone = [await stream(client, *job) for job in jobs]
            return alone, list(await asyncio.gather(*(stream(client, *job) for job in jobs)))

    alone, together = asyncio.run(scenario())
    assert together == alone
    assert len(set(alone)) > len(PROMPTS)


def test_each_expert_is_better_than_the_base_where_it_was_trained(pool_dir: Path) -> None:
    """The report that the build left behind; `loramux evaluate` measures afresh on any data."""
    report = json.loads((pool_dir / "report.json").read_text())
    for expert in report["experts"]:
        assert expert["expert_loss"] < expert["base_loss"], expert["id"]


def test_the_models_are_listed(server: Server, pool_dir: Path, experts: dict[str, Any]) -> None:
    manifest = read_pool(pool_dir).manifest
    with server.openai() as client:
        listed = {model.id for model in client.models.list()}
    assert listed == {"auto", manifest.base.id, *experts, *(entry.id for entry in manifest.sparse)}


@pytest.mark.parametrize("name", ["demo-mixlora", "demo-loracoe"])
def test_sparse_models_over_http_equal_their_formulas_in_float64(
    server: Server, pool_dir: Path, base: Any, tokenizer: Any, name: str
) -> None:
    """The files that ship, read and served, against every token and expert computed on its own."""
    pool = read_pool(pool_dir)
    (entry,) = (entry for entry in pool.manifest.sparse if entry.id == name)
    shapes = BaseShapes.from_model(base, pool.manifest.base.id)
    model = scripted(base, read_sparse(pool.sparse_dir(entry), id=name, base=shapes))
    for text in PROMPTS[:2]:
        expected = own_logprobs(model, tokenizer, text)
        answer = server.post("/v1/completions", model=name, prompt=text, echo=True, logprobs=0, max_tokens=0)
        actual = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
        assert actual == pytest.approx(expected, abs=5e-4)
        assert expected != pytest.approx(own_logprobs(base, tokenizer, text), abs=1e-2)


def test_metrics_tell_what_was_routed(server: Server) -> None:
    server.post("/v1/route", input=PROMPTS[0])
    text = httpx.get(f"{server.url}/metrics").text
    assert "loramux_" in text
    assert "vllm:num_requests_running" in text
