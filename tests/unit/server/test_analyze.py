"""`loramux analyze importance` over the tests' pool: what it writes, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from loramux.server.cli import app
from loramux.server.errors import StartError, UsageError
from loramux.server.importance.plots import heat_map, sorted_plot
from loramux.server.importance.result import off_diagonal, rounded
from tests.kit import DEMO_POOL

TASKS = ("files", "health", "sums")
ROWS = {
    "files": [("find all txt files", "find . -name '*.txt'"), ("list the folder", "ls -l")],
    "health": [("What are the symptoms of flu?", "Fever and cough."), ("What is asthma?", "A disease.")],
    "sums": [("What is 3 plus 4?", "7"), ("What is 5 times 6?", "It is 30.")],
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    folder.mkdir()
    for task, rows in ROWS.items():
        lines = [json.dumps({"instruction": asked, "output": answer}) for asked, answer in rows]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run(data: Path, *arguments: str) -> str:
    command = ["analyze", "importance", "--pool", str(DEMO_POOL), "--data", str(data), *arguments]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_page_and_table_say_the_same(data: Path, tmp_path: Path) -> None:
    out, html = tmp_path / "out.json", tmp_path / "out.html"
    own = f"mine={DEMO_POOL / 'experts/files-find'}"
    table = run(data, "--adapter", own, "--out", str(out), "--html", str(html), "--limit", "1")
    found: dict[str, Any] = json.loads(out.read_text())
    systems = {system["name"]: system for system in found["systems"]}
    assert {name: system["kind"] for name, system in systems.items()} == {
        "demo-mixlora": "mixlora",
        "demo-loracoe": "loracoe",
        "mine": "lora",
    }
    assert found["about"]["rows"] == dict.fromkeys(TASKS, 1)
    for system in systems.values():
        assert tuple(system["loss"]) == TASKS
        assert all(0 < loss < 15 for loss in system["loss"].values())
        for kind in ("q_proj", "down_proj"):
            matrix = torch.tensor(system["task_correlation"][kind])
            assert matrix.shape == (3, 3)
            assert torch.allclose(matrix.diagonal(), torch.ones(3), atol=1e-3)
            assert system["variance"][kind]["rank"] > 0
        ranks = [value for values in system["rank_importance"]["sums"].values() for value in values]
        assert len(ranks) == system["ranks"]
        assert min(ranks) >= 0
        assert 0 < system["concentration"]["sums"]["effective"] <= 1
        shown = [path for path, one in system["rank_correlation"].items() if one["matrix"] is not None]
        assert [path.split(".")[2] for path in shown] == ["3"] * len(shown)
        assert system["name"] in table
    page = html.read_text()
    assert page.count("<svg") >= 3 * (1 + 7 + 7)
    assert not re.search(r"<script|<link|src=|url\(", page)
    assert "nan" not in page


def test_each_row_says_so_and_differs_where_there_are_several(data: Path, tmp_path: Path) -> None:
    found = []
    for number, more in enumerate(([], ["--each-row"])):
        out = tmp_path / f"{number}.json"
        run(data, "--only", "demo-loracoe", "--out", str(out), *more)
        found.append(json.loads(out.read_text()))
    assert [one["about"]["each_row"] for one in found] == [False, True]
    whole, each = (one["systems"][0]["rank_importance"]["files"] for one in found)
    # Rows pull in different directions: what cancels in the task's loss counts in each row's own.
    assert sum(map(sum, each.values())) > sum(map(sum, whole.values()))


def test_what_is_not_there_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(StartError, match="has no 'nobody'; it has"):
        run(data, "--only", "nobody")
    with pytest.raises(UsageError, match="give NAME=PATH"):
        run(data, "--adapter", "x")
    with pytest.raises(UsageError, match="is no directory"):
        run(data, "--adapter", "x=/absent")
    with pytest.raises(StartError, match="choose another"):
        run(data, "--adapter", f"demo-loracoe={DEMO_POOL / 'experts/files-find'}")
    question = {"prompt": "1 + 1 =", "choices": ["2", "3"], "answer": 0}
    (tmp_path / "q.jsonl").write_text(json.dumps(question) + "\n")
    with pytest.raises(StartError, match="no row of the data has an answer"):
        run(tmp_path / "q.jsonl", "--only", "demo-loracoe")


def test_plots_name_what_they_show() -> None:
    matrix = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
    plot = heat_map(matrix, ["a<b", "c"], "q_proj")
    assert "a&lt;b, c: -0.50" in plot
    assert "rgb(255,155,155)" in plot
    assert heat_map(torch.eye(40), [], "many").count("<rect") == 1600
    plot = sorted_plot([("one", torch.tensor([0.1, 0.9]))], "task")
    assert plot.count("<polyline") == 1


def test_numbers_of_the_json() -> None:
    assert rounded([0.123456789, 3, None]) == [0.1235, 3, None]
    assert off_diagonal(torch.arange(9).reshape(3, 3)).tolist() == [1, 2, 5]
    assert off_diagonal(torch.ones(1, 1)).tolist() == []
