"""`loramux pool list | show | check` and `loramux route` over many texts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loramux.server.cli import app
from loramux.server.errors import UsageError
from loramux.server.pool.manifest import PoolError
from loramux.server.settings import DEFAULT_POOL
from tests.kit import DEMO_POOL

TEXTS = ["find all txt files in a folder", "what are the symptoms of flu", "zzz qqq"]


def run(*arguments: str, stdin: str | bytes = "") -> str:
    result = CliRunner().invoke(app, list(arguments), input=stdin, env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_pools_are_listed_with_the_one_that_ships_first(tmp_path: Path) -> None:
    shutil.copytree(DEMO_POOL, tmp_path / "mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/pool.json").write_text("{")
    (tmp_path / "other").mkdir()
    listed = json.loads(run("pool", "list", "--json", str(tmp_path)))
    assert [one["path"] for one in listed] == [
        str(DEFAULT_POOL),
        str(tmp_path / "broken"),
        str(tmp_path / "mine"),
    ]
    assert [one["default"] for one in listed] == [True, False, False]
    assert "problem" in listed[1]
    assert len(listed[2]["experts"]) == 12
    lines = run("pool", "list", str(tmp_path / "mine")).splitlines()
    assert len(lines) == 2
    assert lines[1].endswith("12 experts, 2 sparse models")
    with pytest.raises(PoolError, match="no such directory"):
        run("pool", "list", str(tmp_path / "absent"))


def test_a_pool_shows_what_its_experts_gain() -> None:
    shown = json.loads(run("pool", "show", "--json", str(DEMO_POOL)))
    assert all(one["gain"] > 0 for one in shown["experts"])
    assert {one["kind"] for one in shown["sparse"]} == {"mixlora", "loracoe"}
    text = run("pool", "show", str(DEMO_POOL))
    assert all(one["id"] in text and f"{one['gain']:.3f}" in text for one in shown["experts"])


def test_the_pool_that_ships_is_the_default_of_show_and_check() -> None:
    assert json.loads(run("pool", "show", "--json"))["path"] == str(DEFAULT_POOL)
    assert str(DEFAULT_POOL) in run("pool", "check", "--files")


def test_each_line_of_a_file_and_of_stdin_is_decided_as_alone(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(TEXTS) + "\n")
    from_file = decisions(run("route", "--pool", str(DEMO_POOL), "--file", str(file)))
    from_stdin = decisions(run("route", "--pool", str(DEMO_POOL), "-", stdin="\n".join(TEXTS)))
    assert from_file == from_stdin
    assert [one.pop("text") for one in from_file] == TEXTS
    assert [one["fallback"] for one in from_file] == [False, False, True]
    alone = json.loads(run("route", "--pool", str(DEMO_POOL), "--json", TEXTS[0]))
    assert alone["reason"] == from_file[0]["reason"]
    assert [one["id"] for one in alone["candidates"]] == [one["id"] for one in from_file[0]["candidates"]]
    assert alone["experts"][0]["score"] == pytest.approx(from_file[0]["experts"][0]["score"], abs=1e-6)


def decisions(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_more_texts_than_are_read_at_once() -> None:
    lines = [f"find all txt files in folder {number}" for number in range(130)]
    found = decisions(run("route", "--pool", str(DEMO_POOL), "-", stdin="\n".join(lines)))
    assert [one["text"] for one in found] == lines


def test_stdin_that_is_no_text_is_refused() -> None:
    with pytest.raises(UsageError, match="line 2: not UTF-8"):
        run("route", "--pool", str(DEMO_POOL), "-", stdin=b"one\n\xff\xfe\n")


def test_experts_of_hardly_any_weight_are_not_printed() -> None:
    text = run("route", "--pool", str(DEMO_POOL), TEXTS[0])
    assert "files-find" in text
    assert "0.00  " not in text
    assert "(2 with less than a hundredth left out)" in text
