"""`loramux chat` against a server over a socket."""

import re
import sys
from collections.abc import Iterator
from io import StringIO

import pytest

from loramux.server import cli
from loramux.server.cli.chat import Conversation, printable
from loramux.server.cli.remote import Remote, RemoteError
from loramux.server.engine.protocol import EngineError
from tests.http.serving import TOKENIZER, Served, serving
from tests.kit import ScriptedEngine, saying


@pytest.fixture
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("pool")) as running:
        yield running


def run(monkeypatch: pytest.MonkeyPatch, typed: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["loramux", "chat", *arguments])
    monkeypatch.setattr(sys, "stdin", StringIO(typed))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_each_answer_has_its_experts_and_the_history_goes_along(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = "law law math\nhello\n/system Be brief.\n/model math\n/again\n/quit\nnever asked\n"
    assert run(monkeypatch, typed, "--url", f"{served.url}/v1/", "--max-tokens", "100") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0::3] == ["[law 0.67, math 0.33]", "[the base: no expert fits]", "[math 1.00]"]
    assert lines[1::3] == ["Hello, world."] * 3
    assert all(
        re.fullmatch(r"\d+ tokens; \d+ a second; first after \d\.\d\d s", line) for line in lines[2::3]
    )
    texts = [TOKENIZER.decode(work.prompt) for work in served.engine.works]
    assert "Hello, world." in texts[1]
    assert "Be brief." in texts[2]
    assert texts[2].count("hello") == 1
    assert len(texts) == 3


def test_route_and_model_show_what_the_server_says(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "/route code\n/model\n/help\n/nothing\n", "--url", served.url) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^  1\.00  code +score 1\.000  similarity 0\.500$", out, re.MULTILINE)
    assert "1 experts are named in the text (threshold 0.500, margin 1.000)" in out
    assert "* auto\n" in out
    assert "/again" in out
    assert "/nothing is no command" in err
    assert not served.engine.works


@pytest.mark.parametrize(
    ("typed", "arguments", "named"),
    [
        ("/again\n", [], "nothing has been asked"),
        ("/route\n", [], "nothing has been asked"),
        ("/model nobody\n", [], "'nobody' is not served"),
        ("", ["--model", "nobody"], "'nobody' is not served; auto, "),
        ("hello\n", ["--temperature", "3"], "temperature"),
    ],
)
def test_what_goes_wrong_is_one_line(
    served: Served,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    typed: str,
    arguments: list[str],
    named: str,
) -> None:
    assert run(monkeypatch, typed, "--url", served.url, *arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("loramux: ")
    assert named in line


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "file:///etc/passwd", "127.0.0.1:8000"])
def test_no_server_is_said(url: str) -> None:
    with pytest.raises(RemoteError, match=r"no server answers|no address"):
        Remote(url).models()


def test_a_key_is_needed_where_keys_are_set(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("pool"), keys=("right-key",)) as served:
        assert "auto" in Remote(served.url, "right-key").models()
        with pytest.raises(RemoteError, match="not valid"):
            Remote(served.url, "wrong").models()


def test_a_conversation_goes_on_after_a_failure_and_keeps_what_was_said(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ScriptedEngine(saying(TOKENIZER, "Hello, world."), failure=EngineError("it broke"), fail_after=4)
    with serving(tmp_path_factory.mktemp("pool"), engine=engine) as served:
        talk = Conversation(Remote(served.url), "auto")
        lines = iter(["hello"])

        def ended_after_one() -> str:
            for line in lines:
                return line
            raise EOFError

        talk.interactive(ended_after_one)
        assert capsys.readouterr().err.strip()
        assert [message["role"] for message in talk.messages] == ["user", "assistant"]
        assert "Hello, world.".startswith(talk.messages[1]["content"])
        engine.fail_after = 0
        with pytest.raises(RemoteError):
            talk.take("again?")
        assert len(talk.messages) == 2


def test_control_characters_never_reach_the_terminal() -> None:
    assert printable("a\x1b[31mb\x07\n\tc\u202ed\x9be é 👩‍💻") == "a[31mb\n\tcde é 👩‍💻"
