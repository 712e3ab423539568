"""What is documented is what there is."""

import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from loramux.server.engine.protocol import EngineStats
from loramux.server.metrics import Metrics
from loramux.server.settings import DEMO_POOL, setting_names

DOCS = Path(__file__).parents[2] / "docs"


def shown(default: object) -> str:
    """A default as the table writes it."""
    if default is None:
        return "unset"
    if default == ():
        return "none"
    if default == DEMO_POOL:
        return "the embedded demo pool"
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
    capacity_bytes = used_bytes = pinned_bytes = host_bytes = blends = hits = misses = evictions = 0


def names(registry: CollectorRegistry) -> set[str]:
    counters = {"counter": "_total"}
    return {family.name + counters.get(family.type, "") for family in registry.collect()}


def test_every_metric_is_documented() -> None:
    metrics = Metrics("base", EngineStats, _NoResidency, max_blends=1)
    documented = set(
        re.findall(r"^\| `((?:loramux_|vllm:)[a-z0-9_]+)`", (DOCS / "metrics.md").read_text(), re.MULTILINE)
    )
    assert documented == names(metrics.registry)
