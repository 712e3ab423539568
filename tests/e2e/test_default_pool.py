"""The pool that ships: what a stranger sees after `make serve`, and whether it is true."""

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from loramux.router.store import load_router
from loramux.server.pool.manifest import read_pool
from loramux.server.settings import DEFAULT_POOL
from tests.e2e.conftest import COMMAND, Server, serving
from tests.e2e.test_readme import README, blocks

BASE = "SmolLM2-135M-Instruct"
#: What users say, the expert that is for it, and what it answers.
ANSWERS = {
    "Why was my card payment declined?": ("banking-intent", "declined card payment"),
    "What is the total number of wins when the team is Arsenal?": (
        "sql",
        'SELECT COUNT WINS FROM TABLE WHERE TEAM = "arsenal";',
    ),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--pool", str(DEFAULT_POOL), "--set", "engine.kv_tokens=8192") as running:
        yield running


def ask(server: Server, text: str, model: str = "auto", tokens: int = 24) -> Any:
    messages = [{"role": "user", "content": text}]
    return server.post(
        "/v1/chat/completions", model=model, messages=messages, max_tokens=tokens, temperature=0
    )


def said(answer: Any) -> str:
    content: str = answer["choices"][0]["message"]["content"]
    return content


def resident(server: Server) -> int:
    """Bytes of the serving process in memory, its libraries' and the encoder's files included."""
    return int(psutil.Process(server.process.pid).memory_info().rss)


def test_a_server_that_is_ready_is_small(server: Server) -> None:
    """611 MB were measured. The compiler of torch would be 150 more, experts in float32 24, the pages of a
    file that stays mapped 93."""
    assert resident(server) < 680e6


def test_the_pool_is_sound() -> None:
    done = subprocess.run(
        [*COMMAND, "pool", "check", str(DEFAULT_POOL)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", ANSWERS)
def test_an_expert_answers_what_the_base_cannot(server: Server, text: str) -> None:
    expert, expected = ANSWERS[text]
    routed = ask(server, text)
    assert routed["loramux"]["route"]["experts"][0]["id"] == expert
    assert said(routed) == expected
    assert said(ask(server, text, BASE)) != expected


@pytest.mark.parametrize("model", ["mixlora", "loracoe"])
def test_a_sparse_model_answers_what_the_base_cannot(server: Server, model: str) -> None:
    """Beside the experts under a name of its own; every token chooses inside it, and no router is asked."""
    listed = {one["id"]: one for one in httpx.get(f"{server.url}/v1/models").json()["data"]}
    assert listed[model]["loramux"]["kind"] == model
    text = "What is the total number of wins when the team is Arsenal?"
    answer = ask(server, text, model)
    assert answer["model"] == model
    assert said(answer).startswith("SELECT ")
    assert not said(ask(server, text, BASE)).startswith("SELECT ")


def test_the_pool_fits_into_40_megabytes() -> None:
    assert sum(file.stat().st_size for file in DEFAULT_POOL.rglob("*") if file.is_file()) < 40e6


def test_the_base_answers_what_no_expert_is_for(server: Server) -> None:
    answer = ask(server, "hello")
    assert answer["loramux"]["route"]["fallback"]
    assert said(answer) == "Hello! How can I assist you today?"
    assert "Paris" in said(ask(server, "What is the capital of France?", BASE))


def test_what_the_readme_shows_is_what_comes(server: Server) -> None:
    command = next(block for block in blocks("bash") if "curl" in block)
    body = json.loads(command[command.index("-d '") + 4 : command.rindex("'")])
    assert f"    {said(server.post('/v1/chat/completions', **body))}\n" in README


def test_every_expert_is_worth_its_place(server: Server) -> None:
    """As the build measured it: a seventh of the base's loss at least, on rows that it never saw."""
    report = json.loads((DEFAULT_POOL / "report.json").read_text())
    assert len(report["experts"]) == len(read_pool(DEFAULT_POOL).manifest.experts) == 10
    for line in report["experts"]:
        assert line["expert_loss"] < 6 / 7 * line["base_loss"], line["id"]


def test_every_prompt_to_try_goes_to_its_expert() -> None:
    router = load_router(DEFAULT_POOL / "router")
    for expert in read_pool(DEFAULT_POOL).manifest.experts:
        assert expert.examples
        for decision in router.decide(expert.examples):
            assert decision.experts[0].id == expert.id


def test_the_weights_stay_in_4_bits(server: Server) -> None:
    """After all these answers, by two sparse models too. A gigabyte would be a base in float32."""
    assert resident(server) < 850e6
