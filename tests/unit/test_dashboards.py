"""Dashboards, alert rules and the compose files name what there is."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from loramux.adapters.sparse.shelf import SparseStats
from loramux.adapters.sparse.tally import ExpertLoad
from loramux.server.engine.protocol import EngineStats
from loramux.server.expert_metrics import ExpertPlace, ExpertStats
from loramux.server.job import Job, State
from loramux.server.metrics import Metrics
from tests.panels import DOCKER, RULES, Query, dashboards, panel_queries, rule_queries

#: Labels that Prometheus itself gives.
SCRAPED = {"instance", "job"}
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="Prometheus' promtool is not installed")


def promtool(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(PROMTOOL), *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


class _NoResidency:
    capacity_bytes = used_bytes = pinned_bytes = host_bytes = blends = hits = misses = evictions = 0
    moved_bytes = 0


def labels_by_sample() -> dict[str, set[str]]:
    """Every sample that the server exports once everything has happened, with its labels."""
    load = ExpertLoad((1, 2), 0.5)
    metrics = Metrics("base", EngineStats, _NoResidency, sparse_stats=lambda: SparseStats(1, {"mix": load}))
    metrics.watch(
        routable=lambda: 1,
        ready=lambda: True,
        experts=lambda: ExpertStats({"law": ExpertPlace(4, resident=True, gain=0.1)}, 2),
    )
    job = Job("1", "auto", finish_reasons=["stop"])
    for state in ("routed", "merging", "waiting", "prefill", "decode", "finished"):
        job.to(State(state))
    metrics.closed(job)
    metrics.token_gap(0.1)
    metrics.routed("routed", ["law"], nearest="law", margin=0.1, entropy=1.0, truncated=True)
    metrics.audited("measured", "law", 9, {"base": 2.0, "top1": 1.5, "blend": 1.0})
    metrics.route_stage("embed", 0.1)
    metrics.merged("exact", 0.1, 0.0, 4)
    metrics.answered("GET", "/health", 200, 0.1)
    with metrics.adapter_load():
        pass
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    return labels_by_sample()


@pytest.mark.parametrize("query", [*panel_queries(), *rule_queries()], ids=lambda query: query.place)
def test_what_a_panel_or_a_rule_names_is_exported(exported: dict[str, set[str]], query: Query) -> None:
    known = {name: labels | SCRAPED for name, labels in exported.items()}
    named = query.metrics()
    assert named or "up{" in query.expression
    for name, selected in named:
        assert name in known
        assert selected <= known[name]
    if named:
        assert query.grouped_by() <= set.union(*(known[name] for name, _ in named))


def test_panels_have_titles_explanations_and_places_of_their_own() -> None:
    assert len({dashboard["uid"] for dashboard in dashboards().values()}) == len(dashboards()) >= 2
    for dashboard in dashboards().values():
        panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
        assert all(panel["title"] and panel["description"] for panel in panels)
        assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
        cells = [
            (x, y)
            for place in (panel["gridPos"] for panel in dashboard["panels"])
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        assert len(cells) == len(set(cells))
        assert max(x for x, _ in cells) < 24


def test_every_alert_has_a_test_that_it_fires_and_one_that_it_does_not() -> None:
    files = [yaml.safe_load(path.read_text()) for path in (DOCKER / "prometheus").glob("*_test.yml")]
    tests = [test for file in files for test in file["tests"]]
    outcomes = [
        (rule["alertname"], bool(rule["exp_alerts"])) for test in tests for rule in test["alert_rule_test"]
    ]
    assert set(outcomes) == {(query.place, fires) for query in rule_queries() for fires in (True, False)}


def test_what_compose_mounts_and_prometheus_reads_exists() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    override = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())
    for service in compose["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert not source.startswith("./") or (DOCKER / source).is_dir()
    for one in (compose, override):
        assert (DOCKER.parent / one["services"]["loramux"]["build"]["dockerfile"]).is_file()
    config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    assert config["rule_files"] == [RULES.name]
    assert config["scrape_configs"][0]["static_configs"] == [{"targets": ["loramux:8000"]}]


@needs_promtool
@pytest.mark.parametrize(
    "command",
    [
        ("check", "rules", "rules.yml"),
        ("test", "rules", "rules_test.yml", "rules_day_test.yml"),
        ("check", "config", "prometheus.yml"),
    ],
    ids=" ".join,
)
def test_promtool_accepts_it(command: tuple[str, ...]) -> None:
    done = promtool(DOCKER / "prometheus", *command)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_the_tests_of_the_rules_notice_a_changed_threshold(tmp_path: Path) -> None:
    for name in ("rules.yml", "rules_test.yml"):
        text = (DOCKER / "prometheus" / name).read_text()
        (tmp_path / name).write_text(text.replace("> 0.05", "> 0.5"))
    assert promtool(tmp_path, "test", "rules", "rules_test.yml").returncode != 0
