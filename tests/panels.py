"""The dashboards and alert rules under docker/, as their queries."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DOCKER = Path(__file__).parents[1] / "docker"
RULES = DOCKER / "prometheus" / "rules.yml"
DASHBOARDS = sorted((DOCKER / "grafana" / "dashboards").glob("*.json"))

#: A metric and, where it has one, its selector.
_METRIC = re.compile(r"\b((?:loramux_|vllm:|process_)[a-z0-9_]+)(?:\{([^}]*)\})?")
_LABEL = re.compile(r'(\w+)\s*[=!]~?\s*"')


@dataclass(frozen=True)
class Query:
    """A PromQL expression and where it stands."""

    place: str
    expression: str

    def asked(self, window: str) -> str:
        """As Grafana would send it: for every server, over that window."""
        return self.expression.replace("$__rate_interval", window).replace("$instance", ".+")

    def metrics(self) -> list[tuple[str, set[str]]]:
        """The samples that are named, each with the labels that are selected by."""
        return [(name, set(_LABEL.findall(selector))) for name, selector in _METRIC.findall(self.expression)]

    def grouped_by(self) -> set[str]:
        """The labels of `by (...)` and `on (...)`."""
        found = re.findall(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", self.expression)
        return {label.strip() for labels in found for label in labels.split(",")}


def dashboards() -> dict[str, Any]:
    """The dashboards by file name."""
    return {path.name: json.loads(path.read_text()) for path in DASHBOARDS}


def panel_queries() -> list[Query]:
    """Every target of every panel."""
    return [
        Query(f"{name}: {panel['title']}", target["expr"])
        for name, dashboard in dashboards().items()
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    ]


def rule_queries() -> list[Query]:
    """Every alert's expression."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [Query(rule["alert"], rule["expr"]) for group in groups for rule in group["rules"]]
