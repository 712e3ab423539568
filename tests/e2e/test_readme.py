"""The examples of the README, run as they stand against a running server."""

import json
import re
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Server

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
