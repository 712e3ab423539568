"""The examples of the README, run as they stand against a running server."""

import json
import re
import shlex
import sys
from pathlib import Path

import httpx
import pytest

from loramux.server import cli
from tests.e2e.conftest import Server, serving
from tests.pool_kit import BASE, topic_texts, write_adapter, write_base

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_curl_example_gets_an_answer(server: Server) -> None:
    command = next(block for block in blocks("bash") if "curl" in block)
    url, body = re.search(r"curl (\S+) .*?-d '(.*)'", command, re.DOTALL).groups()  # type: ignore[union-attr]
    answer = httpx.post(
        url.replace("http://127.0.0.1:8000", server.url), json=json.loads(body), timeout=60
    ).json()
    assert answer["choices"][0]["message"]["content"]
    assert answer["loramux"]["route"]["experts"]


def test_the_python_example_prints_an_answer_and_its_experts(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = blocks("python")
    closing = "\nclient.close()\n"
    exec(example.replace("http://127.0.0.1:8000", server.url) + closing, {})
    answer, experts = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert answer
    assert "weight" in experts


OWN = README.split("## Your own model and adapters")[1].split("\n## ")[0]
#: The names that the README gives to what a user has, and topics of the tests.
TOPICS = {"sql": "kitchen", "law": "harbour", "poetry": "garden"}


@pytest.fixture
def have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what the README takes for granted: adapters, texts, a corpus and a base."""
    write_base(tmp_path / BASE)
    corpus = []
    for name, topic in TOPICS.items():
        write_adapter(tmp_path / "adapters" / name, topic)
        texts = topic_texts(topic, 140)
        (tmp_path / f"{name}.txt").write_text("\n".join(texts[:10]))
        rows = [json.dumps({"instruction": text, "input": "", "output": "yes"}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows[:10]))
        corpus += rows
    for folder in ("DIR", "TESTS"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text("\n".join(corpus))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command as the shell would have it, `MODEL` being the base."""
    monkeypatch.setattr(sys, "argv", shlex.split(re.sub(r"\bMODEL\b", BASE, line)))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code, line


def test_a_pool_of_own_rows_is_built_checked_served_and_measured(
    have: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = next(block for block in re.findall(r"```bash\n(.*?)```", OWN, re.DOTALL) if "pool build" in block)
    lines = [line for line in block.splitlines() if line.startswith("loramux ")]
    assert lines.pop() == "loramux serve --pool my-pool"
    inline = re.findall(r"`(loramux (?:doctor|evaluate) [^`]*)`", OWN)
    assert [line.split()[1] for line in (*lines, *inline)] == ["pool", "pool", "doctor", "evaluate"]
    for line in (*lines, *inline):
        run(line, monkeypatch)
    with serving("--pool", "my-pool") as server:
        asked = [{"role": "user", "content": topic_texts("kitchen", 1, seed=7)[0]}]
        answer = server.post("/v1/chat/completions", model="auto", messages=asked, max_tokens=4)
    assert answer["usage"]["prompt_tokens"]


def test_a_pool_of_own_adapters_is_made_grown_and_shrunk(
    have: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    block = next(block for block in re.findall(r"```bash\n(.*?)```", OWN, re.DOTALL) if "pool new" in block)
    lines = block.splitlines()
    assert [line.split()[2] for line in lines] == ["new", "add", "remove", "show", "list"]
    for line in lines:
        run(line, monkeypatch)
    experts = json.loads((have / "my-pool" / "pool.json").read_text())["experts"]
    assert [one["id"] for one in experts] == ["sql", "poetry"]
    assert "my-pool" in capsys.readouterr().out
