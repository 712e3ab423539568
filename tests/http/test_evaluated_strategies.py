"""An evaluation of the strategies that ask the experts, against what a server on the same pool answers."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from loramux.adapters.training.chat import EncodedRow, encode_rows
from loramux.adapters.training.rows import Row
from loramux.server.build import build
from loramux.server.evaluation.evaluate import Options, evaluate
from loramux.server.evaluation.result import Evaluation
from loramux.server.settings import Settings, load_settings
from tests.http.serving import listening
from tests.kit import DEMO_POOL

SYSTEMS = ("arrow top 2", "spectr top 2", "logo top 1", "logo top 2")
ROWS = {
    "files": Row(
        "Find all .log files larger than 10 megabytes in /var", "", "find /var -name '*.log' -size +10M"
    ),
    "points": Row("What is the total number of points when the driver is Senna?", "", "SELECT SUM Points"),
}


@pytest.fixture(scope="module")
def settings() -> Settings:
    flags = {"pool": DEMO_POOL, "verify_pool": False, "device": "cpu", "dtype": "float32"}
    return load_settings(flags=flags)


@pytest.fixture(scope="module")
def evaluation(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    data = tmp_path_factory.mktemp("data")
    for domain, row in ROWS.items():
        line = {"instruction": row.instruction, "input": row.input, "output": row.output}
        (data / f"{domain}.test.jsonl").write_text(json.dumps(line))
    options = Options(data=(data,), only=("base", "experts", *SYSTEMS), top_m=(1, 2), max_new=0)
    return evaluate(settings, options)


@pytest.fixture(scope="module")
def rows() -> dict[str, EncodedRow]:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_POOL / "base")
    return {domain: encode_rows(tokenizer, [row], 1024)[0] for domain, row in ROWS.items()}


@pytest.fixture(scope="module")
def server(settings: Settings) -> Iterator[httpx.Client]:
    with listening(build(settings)) as (url, _), httpx.Client(base_url=url, timeout=120) as http:
        yield http


def completed(server: httpx.Client, tokens: tuple[int, ...], **fields: Any) -> dict[str, Any]:
    answer = server.post("/v1/completions", json={"prompt": list(tokens), "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def nats(server: httpx.Client, row: EncodedRow, **fields: Any) -> float:
    """Of a row's answer, as the server scores a prompt."""
    asked = {"echo": True, "logprobs": 0, "max_tokens": 0, "model": "auto", **fields}
    (choice,) = completed(server, row.ids, **asked)["choices"]
    return -sum(choice["logprobs"]["token_logprobs"][row.answer_start :])


@pytest.mark.parametrize("strategy", ["arrow", "spectr"])
@pytest.mark.parametrize("domain", ROWS)
def test_tokens_choose_as_they_do_when_served(
    evaluation: Evaluation, server: httpx.Client, rows: dict[str, EncodedRow], domain: str, strategy: str
) -> None:
    expected = nats(server, rows[domain], routing={"strategy": strategy, "top_m": 2})
    assert evaluation.scores[f"{strategy} top 2"][domain].nats == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("domain", ROWS)
def test_logo_hears_the_prompt_without_its_answer(
    evaluation: Evaluation, server: httpx.Client, rows: dict[str, EncodedRow], domain: str, width: int
) -> None:
    row = rows[domain]
    routing = {"strategy": "logo", "top_m": width}
    prompt = row.ids[: row.answer_start]
    route = completed(server, prompt, model="auto", max_tokens=1, routing=routing)["loramux"]["route"]
    mixture = [{"id": one["id"], "scale": one["weight"]} for one in route["experts"]]
    expected = nats(server, row, lora=mixture)
    found = evaluation.scores[f"logo top {width}"][domain].nats
    assert found == pytest.approx(expected, rel=1e-4)
    if width == 1:
        assert found == pytest.approx(evaluation.scores[route["experts"][0]["id"]][domain].nats, rel=1e-5)


def test_they_stand_in_the_report(evaluation: Evaluation) -> None:
    kinds = {system.name: system.kind for system in evaluation.systems}
    assert [name for name, kind in kinds.items() if kind == "asking"] == list(SYSTEMS)
    assert all(evaluation.gain_share(name) is not None for name in SYSTEMS)
