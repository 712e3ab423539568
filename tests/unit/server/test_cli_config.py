"""`loramux config`: what the server would have, and from where."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loramux.server.cli import app
from loramux.server.errors import StartError
from loramux.server.settings import setting_names


def printed(*arguments: str, **environment: str) -> str:
    result = CliRunner().invoke(app, ["config", *arguments], env={"COLUMNS": "200", **environment})
    if result.exception is not None:
        raise result.exception
    return result.output


def listed(*arguments: str, **environment: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(printed("--json", *arguments, **environment))
    return found


def test_each_setting_says_which_place_won(tmp_path: Path) -> None:
    file = tmp_path / "loramux.yaml"
    file.write_text("port: 1\nlimits: {max_n: 2, max_stop: 3}\nhost: '::1'\n")
    found = listed(
        "--config", str(file), "--set", "limits.max_n=5", LORAMUX_PORT="9", LORAMUX_LIMITS__MAX_STOP="8"
    )
    assert list(found) == [name for name, _, _ in setting_names()]
    assert found["host"] == {"value": "::1", "source": str(file)}
    assert found["port"] == {"value": 9, "source": "environment"}
    assert found["limits.max_stop"] == {"value": 8, "source": "environment"}
    assert found["limits.max_n"] == {"value": 5, "source": "flag"}
    assert found["limits.max_prompts"] == {"value": 16, "source": "default"}


def test_only_what_was_changed(tmp_path: Path) -> None:
    assert listed("--changed", LORAMUX_PORT="9") == {"port": {"value": 9, "source": "environment"}}
    assert "environment" in printed("--changed", LORAMUX_PORT="9")


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_keys_are_never_shown(form: tuple[str, ...]) -> None:
    text = printed(*form, LORAMUX_API_KEYS="sesame,open", LORAMUX_ADMIN_KEY="simsim")
    assert "(hidden)" in text
    assert not any(key in text for key in ("sesame", 'open"', "simsim"))


def test_what_would_stop_the_server_stops_this() -> None:
    with pytest.raises(StartError, match="max_nn"):
        printed("--set", "limits.max_nn=1")
    with pytest.raises(StartError, match="name=value"):
        printed("--set", "port")
