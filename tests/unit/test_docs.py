"""What is documented is what there is."""

import re
import shlex
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from loramux.server.cli.commands import COMMANDS, load
from loramux.server.engine.protocol import EngineStats
from loramux.server.metrics import Metrics
from loramux.server.settings import DEFAULT_POOL, setting_names

DOCS = Path(__file__).parents[2] / "docs"


def shown(default: object) -> str:
    """A default as the table writes it."""
    if default is None:
        return "unset"
    if default == ():
        return "none"
    if default == DEFAULT_POOL:
        return "the pool that ships"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def test_every_setting_is_documented_with_its_default() -> None:
    text = (DOCS / "configuration.md").read_text()
    expected = [f"| `{name}` | {shown(default)} | {meaning} |" for name, meaning, default in setting_names()]
    assert [row for row in expected if row not in text] == []
    documented = re.findall(r"^\| `([a-z_.]+)` \|", text, re.MULTILINE)
    assert documented == [name for name, _, _ in setting_names()]


def test_every_route_is_documented() -> None:
    source = (DOCS.parent / "server" / "routes").glob("*.py")
    found = {
        f"{method.upper()} {path.replace(':path', '')}"
        for file in source
        for method, path in re.findall(r"@router\.(get|post)\(\"([^\"]+)\"\)", file.read_text())
    }
    documented = set(
        re.findall(r"`((?:GET|POST) /[^`]*)`", (DOCS / "http.md").read_text().split("## Which model")[0])
    )
    assert len(found) >= 14
    assert documented == found


class _NoResidency:
    capacity_bytes = used_bytes = pinned_bytes = host_bytes = blends = hits = misses = evictions = (
        moved_bytes
    ) = 0


def names(registry: CollectorRegistry) -> set[str]:
    counters = {"counter": "_total", "info": "_info"}
    return {family.name + counters.get(family.type, "") for family in registry.collect()}


def test_every_metric_is_documented() -> None:
    metrics = Metrics("base", EngineStats, _NoResidency)
    documented = set(
        re.findall(
            r"^\| `((?:loramux_|vllm:|process_)[a-z0-9_]+)`", (DOCS / "metrics.md").read_text(), re.MULTILINE
        )
    )
    assert documented == names(metrics.registry)


def documented_commands() -> list[list[str]]:
    """Every `loramux …` command line of the README and the docs, in words."""
    files = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
    lines = [line.split("  #")[0] for file in files for line in file.read_text().splitlines()]
    inline = [match for line in lines for match in re.findall(r"`(loramux [^`]+)`", line)]
    alone = [line.strip() for line in lines if re.match(r"\s*loramux [a-z]", line)]
    return [shlex.split(line) for line in [*alone, *inline] if "|" not in line]


@pytest.mark.parametrize("words", documented_commands(), ids=" ".join)
def test_documented_commands_and_their_options_exist(words: list[str]) -> None:
    name, rest = words[1], words[2:]
    if name.startswith("--"):
        assert name in ("--help", "--version", "--completion")
        return
    assert name in COMMANDS
    command = load(name)
    if hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in rest if word.startswith("--")} <= known


def test_the_readme_documents_commands() -> None:
    assert len(documented_commands()) >= 8
