"""The command line: quick help, and one line for what the operator can mend."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from loramux.server import cli
from loramux.server.cli.serve import DEFAULT_QUESTION, ready_line
from loramux.server.pool.routing import load_pool_router, open_pool
from loramux.server.settings import load_settings


def failing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["loramux", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    out = capsys.readouterr()
    assert out.out == ""
    (line,) = out.err.splitlines()
    assert line.startswith("loramux: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--set", "limits.max_m=3"], "limits.max_m"),
        (["--set", "limits.max_n"], "name=value"),
        (["--set", "port.x=1", "--port", "1"], "port is not a section"),
        (["--set", "limits.max_n={"], "not YAML"),
        (["--port", "99999"], "'port'"),
        (["--config", "/absent.yaml"], "/absent.yaml"),
        (["--quantization", "int3"], "'quantization'"),
        (["--pool", "/absent", "--port", "0"], "/absent"),
    ],
)
def test_what_stops_the_start_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert named in failing(monkeypatch, capsys, "serve", *arguments)


def test_a_taken_port_is_known_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = failing(monkeypatch, capsys, "serve", "--port", port, "--pool", "/absent")
    assert f"port {port}" in line
    assert "--port" in line


def test_help_and_version_load_no_torch() -> None:
    probe = (
        "import sys; sys.argv = ['loramux', {!r}]\n"
        "from loramux.server.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({{'torch', 'transformers', 'faiss'}} & set(sys.modules)))"
    )
    for argument, expected in (("--help", "serve"), ("version", "loramux 0.")):
        done = subprocess.run(
            [sys.executable, "-c", probe.format(argument)], capture_output=True, text=True, check=True
        )
        assert expected in done.stdout
        assert done.stdout.rstrip().endswith("[]")


@pytest.mark.parametrize("group", sorted(cli.SUB_APPS))
def test_every_group_in_the_help_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], group: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["loramux", group, "--help"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    assert f"loramux {group}" in capsys.readouterr().out


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
