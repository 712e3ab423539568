"""The command line: quick help, and one line for what the operator can mend."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loramux.server import cli
from loramux.server.cli.commands import COMMANDS, load
from loramux.server.cli.failures import explain
from loramux.server.cli.serve import DEFAULT_QUESTION, ready_line
from loramux.server.pool.routing import load_pool_router, open_pool
from loramux.server.settings import load_settings


def failing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, *arguments: str
) -> str:
    monkeypatch.setattr(sys, "argv", ["loramux", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out = capsys.readouterr()
    assert out.out == ""
    (line,) = out.err.splitlines()
    assert line.startswith("loramux: error: ")
    assert caught.value.code == code, line
    return line


SETTINGS = [
    (2, ["--set", "limits.max_n"], "name=value"),
    (2, ["--set", "port.x=1", "--set", "port=1", "--set", "port.y=1"], "port is not a section"),
    (2, ["--set", "limits.max_n={"], "not YAML"),
    (1, ["--set", "limits.max_m=3"], "limits.max_m"),
    (1, ["--set", "port=99999"], "'port'"),
    (1, ["--config", "/absent.yaml"], "/absent.yaml"),
    (1, ["--set", "quantization=int3"], "'quantization'"),
]
#: Of every command, something that it cannot do: exit code, arguments, what the line names.
FAILURES = [
    *(
        (code, [command, *rest], named)
        for command in ("serve", "doctor", "config")
        for code, rest, named in SETTINGS
    ),
    (1, ["serve", "--pool", "/absent", "--port", "0"], "/absent"),
    (2, ["serve", "--port", "many"], "see `loramux serve --help`"),
    (2, ["deploy", "ray"], "--replicas"),
    (2, ["deploy", "ray", "--replicas", "2", "--port", "0"], "--port"),
    (1, ["deploy", "ray", "--replicas", "2", "--pool", "/absent"], "is /absent a pool"),
    (2, ["rout", "text"], "Did you mean 'route'"),
    (2, ["--nope"], "see `loramux --help`"),
    (2, ["--completion", "ksh"], "bash"),
    (2, ["version", "2"], "see `loramux version --help`"),
    (2, ["config", "more"], "see `loramux config --help`"),
    (2, ["doctor", "more"], "see `loramux doctor --help`"),
    (2, ["route"], "--file"),
    (2, ["route", "a", "--file", "b.txt"], "--file"),
    (1, ["route", "--file", "/absent.txt"], "/absent.txt"),
    (1, ["route", "--pool", "/absent", "text"], "is /absent a pool"),
    (1, ["route", "--config", "/absent.yaml", "text"], "/absent.yaml"),
    (1, ["chat", "--url", "nowhere"], "try http://127.0.0.1:8000"),
    (1, ["chat", "--url", "http://127.0.0.1:9"], "is `loramux serve` running?"),
    (2, ["chat", "--seed", "x"], "see `loramux chat --help`"),
    (2, ["evaluate"], "--data"),
    (2, ["evaluate", "--data", "x", "--top-m", "0"], "--top-m"),
    (1, ["evaluate", "--data", "/absent.jsonl"], "/absent.jsonl"),
    (1, ["evaluate", "--data", "/absent.jsonl", "--pool", "/absent"], "/absent"),
    (2, ["analyze", "importance"], "--data"),
    (2, ["analyze", "importance", "--data", "x", "--adapter", "a"], "NAME=PATH"),
    (1, ["analyze", "importance", "--data", "/absent.jsonl"], "/absent.jsonl"),
    (2, ["convert"], "see `loramux convert --help`"),
    (2, ["convert", "x", "--layout", "2"], "--layout"),
    (1, ["convert", "/absent"], "/absent"),
    (2, ["pool", "shaw"], "Did you mean 'show'"),
    (1, ["pool", "check", "/absent"], "is /absent a pool"),
    (1, ["pool", "check", "--files", "/absent"], "is /absent a pool"),
    (1, ["pool", "show", "/absent"], "is /absent a pool"),
    (1, ["pool", "list", "/absent"], "name folders that hold pools"),
    (1, ["pool", "remove", "/absent", "--id", "a"], "is /absent a pool"),
    (2, ["pool", "remove", "/absent"], "--id"),
    (1, ["pool", "add", "/absent", "/absent", "--id", "a", "--data", "/absent.txt"], "/absent"),
    (2, ["pool", "add", "/absent"], "see `loramux pool add --help`"),
    (1, ["pool", "add-sparse", "/absent", "/absent", "--id", "a"], "/absent"),
    (2, ["pool", "add-sparse"], "see `loramux pool add-sparse --help`"),
    (2, ["pool", "new", "--out", "/absent/out", "--base", "b", "--expert", "a"], "ID=PATH:ROWS"),
    (2, ["pool", "new", "--out", "/absent/out", "--base", "b", "--expert", "a=/absent:b"], "/absent"),
    (2, ["pool", "build"], "--data"),
    (1, ["pool", "build", "--data", "/absent.jsonl", "--out", "/absent/out", "--base", "b"], "/absent.jsonl"),
    (2, ["router", "fit"], "see `loramux router fit --help`"),
    (2, ["router", "fit", "/absent", "--data", "x", "--classifier", "svm"], "--classifier"),
    (1, ["router", "fit", "/absent", "--data", "/absent.jsonl"], "is /absent a pool"),
    (2, ["train", "exprt"], "Did you mean 'expert'"),
    (2, ["train", "base", "--data", "x"], "--out"),
    (2, ["train", "lora", "--data", "x", "--out", "y", "--base", "z", "--rank", "0"], "--rank"),
    (1, ["train", "base", "--data", "/absent.jsonl", "--out", "/absent/out"], "/absent.jsonl"),
    (1, ["train", "embedder", "--data", "/absent.jsonl", "--out", "/absent/out"], "/absent.jsonl"),
    *(
        (
            1,
            ["train", kind, "--data", "/absent.jsonl", "--base", "b", "--out", "/absent/out"],
            "/absent.jsonl",
        )
        for kind in ("expert", "lora", "dora", "mixlora", "loracoe", "loramoe")
    ),
    (
        2,
        ["train", "mixlora", "--data", "x", "--base", "b", "--out", "y", "--strategy", "best"],
        "strategy must be top_k or switch",
    ),
]


@pytest.mark.parametrize(("code", "arguments", "named"), FAILURES, ids=lambda value: str(value)[:40])
def test_what_goes_wrong_is_one_line_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int,
    arguments: list[str],
    named: str,
) -> None:
    assert named in failing(monkeypatch, capsys, code, *arguments)


def test_the_table_has_every_command() -> None:
    tried = {" ".join(words[:count]) for _, words, _ in FAILURES for count in (1, 2)}
    assert {path for path, _ in commands()} <= tried


def commands() -> list[tuple[str, Any]]:
    """Every command by its words, as the argument parser has it."""
    found: list[tuple[str, Any]] = []
    for name in COMMANDS:
        command = load(name)
        inner = getattr(command, "commands", None)
        found += (
            [(name, command)] if inner is None else [(f"{name} {key}", one) for key, one in inner.items()]
        )
    return found


@pytest.mark.parametrize(
    ("path", "command"), commands(), ids=lambda value: str(value) if isinstance(value, str) else ""
)
def test_the_help_has_an_example_that_parses(
    path: str, command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["loramux", *path.split(), "--help"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    lines = capsys.readouterr().out.partition("Example:\n")[2].splitlines()
    examples = [line.strip() for line in lines if line.strip()]
    assert examples
    for example in examples:
        words = shlex.split(example.partition(" > ")[0])
        words = words[words.index("loramux") :]
        assert words[1 : 1 + len(path.split())] == path.split()
        with command.make_context(path, words[1 + len(path.split()) :]) as context:
            assert not context.args


def test_the_summaries_in_the_list_of_commands_are_sentences() -> None:
    for place in COMMANDS.values():
        assert place.summary[0].isupper()
        assert place.summary.endswith(".")
        assert len(place.summary) < 66  # the list is one line a command on 80 columns


@pytest.mark.parametrize("name", COMMANDS)
def test_groups_list_whole_sentences_and_completion_is_at_the_top_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["loramux", name, "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert "-completion" not in shown
    for child in getattr(load(name), "commands", {}).values():
        assert child.short_help in shown
        assert not child.short_help.endswith("...")


@pytest.mark.parametrize("words", [[], ["pool"], ["router"], ["train"], ["analyze"]], ids=str)
def test_a_group_alone_says_what_it_holds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["loramux", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "Commands:" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_a_shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["loramux", "--completion", shell])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert f"_LORAMUX_COMPLETE=complete_{shell}" in capsys.readouterr().out


def test_bash_completes_with_what_was_printed(tmp_path: Path) -> None:
    """In a real bash, with the very script that `--completion` prints."""
    bash = shutil.which("bash")
    assert bash is not None
    command = tmp_path / "loramux"
    command.write_text(f"#!{sys.executable}\nfrom loramux.server.cli import main\nmain()\n")
    command.chmod(0o755)
    expected = {
        "po": {"pool"},
        "pool s": {"show"},
        "pool build --min": {"--min-rows", "--minutes-per-expert"},
        "--completion ": {"bash", "zsh", "fish"},
    }
    lines = ['eval "$(loramux --completion bash)"']
    for line in expected:
        words = ["loramux", *line.split(" ")]
        lines += [
            f"COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}",
            "_loramux_completion loramux",
            'echo "${COMPREPLY[*]}"',
        ]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [bash, "-c", "\n".join(lines)], capture_output=True, text=True, check=True, env=environment
    )
    assert [set(line.split()) for line in done.stdout.splitlines()] == list(expected.values())


def test_a_bug_is_not_made_to_look_like_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    assert explain(KeyError("x")) is None
    assert explain(PermissionError(13, "Permission denied", "/pool")) == (
        "loramux: error: /pool: Permission denied", 1
    )  # fmt: skip


def test_a_taken_port_is_known_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = failing(monkeypatch, capsys, 1, "serve", "--port", port, "--pool", "/absent")
    assert f"port {port}" in line
    assert "--port" in line


def test_the_ready_line_is_a_command_that_can_be_pasted() -> None:
    line = ready_line("http://127.0.0.1:8000", needs_key=False)
    assert "\n" not in line
    assert re.search(r"curl http://127.0.0.1:8000/v1/chat/completions .*-d '\{.*\}'$", line)
    assert "Bearer" not in line
    assert "Bearer" in ready_line("http://127.0.0.1:8000", needs_key=True)


def test_the_makefile_and_ci_agree() -> None:
    root = Path(__file__).parents[3]
    assert "make test" in (root / ".ci" / "run").read_text()


def test_the_ready_line_of_the_pool_that_ships_asks_what_an_expert_is_for() -> None:
    line = ready_line("http://127.0.0.1:8000", DEFAULT_QUESTION, needs_key=False)
    body = json.loads(line.partition(" -d '")[2].rstrip("'"))
    assert body["temperature"] == 0
    settings = load_settings()
    router = load_pool_router(settings, open_pool(settings))
    [decision] = router.decide([body["messages"][0]["content"]])
    assert not decision.fallback
    assert decision.experts[0].id == "sql"
