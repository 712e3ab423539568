"""`loramux doctor` beside a server that runs."""

import json
from pathlib import Path

from typer.testing import CliRunner

from loramux.server.cli import app
from tests.http.serving import serving


def test_a_port_that_a_loramux_has_is_no_problem(tmp_path: Path) -> None:
    with serving(tmp_path) as running:
        port = running.url.rpartition(":")[2]
        result = CliRunner().invoke(app, ["doctor", "--pool", "/absent", "--set", f"port={port}", "--json"])
    [found] = [one for one in json.loads(result.stdout)["findings"] if one["name"] == "port"]
    assert found["level"] == "note"
    assert "taken by loramux" in found["text"]
    assert "--port" in found["advice"]
