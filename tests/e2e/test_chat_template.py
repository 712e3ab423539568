"""A chat template in place of the base's own: it writes the prompts, and tools are as it knows them."""

import json
from pathlib import Path

import pytest

from loramux.server.build import load_tokenizer
from loramux.server.errors import StartError
from tests.e2e.conftest import serving
from tests.kit import DEMO_POOL
from tests.tool_kit import TOOLS, template

BASE = str(DEMO_POOL / "base")


def test_a_base_without_tools_has_them_by_another_template(tmp_path: Path) -> None:
    file = tmp_path / "tools.jinja"
    file.write_text(template("hermes"))
    asked = {"model": "auto", "messages": [{"role": "user", "content": "Is it warm in Rome?"}]}
    with serving("--set", f"chat_template={file}") as server:
        shown = server.post("/tokenize", messages=asked["messages"], return_token_strs=True)
        answer = server.post("/v1/chat/completions", **asked, tools=TOOLS, tool_choice="required", seed=1)
    (call, *_) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] in ("get_weather", "now")
    assert isinstance(json.loads(call["function"]["arguments"]), dict)
    assert shown["count"] < answer["usage"]["prompt_tokens"]  # the tools are in the prompt


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "No such file"),
        ("{% for message in messages %}", "end"),
        ("{{ raise_exception('not for chats') }}", "not for chats"),
        ("\udcff", "utf-8"),
    ],
    ids=["missing", "syntax", "refusing", "bytes"],
)
def test_a_template_that_cannot_be_used_stops_the_start(tmp_path: Path, text: str | None, named: str) -> None:
    file = tmp_path / "bad.jinja"
    if text is not None:
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(StartError, match=named) as caught:
        load_tokenizer(BASE, file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
