"""The evaluation of a pool as numbers: what every system did on every domain, and how well it was routed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from loramux.server.evaluation.routing import RoutingTable
from loramux.server.evaluation.score import DomainScore
from loramux.server.evaluation.systems import BASE, System

Measure = Literal["loss", "exact", "acc", "acc_norm"]
MEASURES: tuple[Measure, ...] = ("loss", "exact", "acc", "acc_norm")


@dataclass(frozen=True)
class Evaluation:
    """`experts`: expert -> the domain it is for. `routing`: strategy -> table. `scores`: system -> domain ->
    score, empty where only the routing was measured. `about`: what was measured, and how."""

    pool: str
    experts: Mapping[str, str]
    routing: Mapping[str, RoutingTable]
    systems: Sequence[System]
    scores: Mapping[str, Mapping[str, DomainScore]]
    about: Mapping[str, Any]

    @property
    def domains(self) -> list[str]:
        """Every domain, in the order of the report."""
        return sorted({domain for table in self.routing.values() for domain in table.counts})

    def value(self, system: str, domain: str, measure: Measure) -> float | None:
        """One number; None where it was not measured."""
        score = self.scores.get(system, {}).get(domain)
        return None if score is None else getattr(score, measure)

    def oracle(self, domain: str, measure: Measure) -> tuple[str, float] | None:
        """The single expert that is best on a domain, chosen by the answers, and its value."""
        found = [
            (system.name, value)
            for system in self.systems
            if system.kind == "expert" and (value := self.value(system.name, domain, measure)) is not None
        ]
        if not found:
            return None
        pick = min if measure == "loss" else max
        return pick(found, key=lambda entry: entry[1])

    def gain_share(self, system: str, domains: Sequence[str] | None = None) -> float | None:
        """How much of the nats that the best single expert of each domain saves over the base a system saves
        too, summed over domains; None where the experts save nothing or something was not measured."""
        saved = possible = 0.0
        for domain in self.domains if domains is None else domains:
            base, best = self.value(BASE, domain, "loss"), self.oracle(domain, "loss")
            mine = self.value(system, domain, "loss")
            if base is None and mine is None:
                continue  # questions only
            if base is None or best is None or mine is None:
                return None
            tokens = self.scores[BASE][domain].tokens
            saved += (base - mine) * tokens
            possible += (base - best[1]) * tokens
        return saved / possible if possible > 0 else None

    def json(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        measured = [measure for measure in MEASURES if self._has(measure)]
        return {
            "pool": self.pool,
            "about": dict(self.about),
            "experts": dict(self.experts),
            "routing": {name: _routing(table) for name, table in self.routing.items()},
            "systems": [asdict(system) for system in self.systems],
            "scores": {
                system: {domain: asdict(score) for domain, score in row.items()}
                for system, row in self.scores.items()
            },
            "oracle": {
                measure: {domain: self.oracle(domain, measure) for domain in self.domains}
                for measure in measured
            },
            "gain_share": {system.name: self.gain_share(system.name) for system in self.systems},
        }

    def _has(self, measure: Measure) -> bool:
        return any(
            self.value(system.name, domain, measure) is not None
            for system in self.systems
            for domain in self.domains
        )

    @property
    def measured(self) -> list[Measure]:
        """The measures that any item had."""
        return [measure for measure in MEASURES if self._has(measure)]


def _routing(table: RoutingTable) -> dict[str, Any]:
    return {
        "accuracy": table.accuracy(),
        "counts": {domain: dict(row) for domain, row in table.counts.items()},
        "reliability": None if table.reliability is None else asdict(table.reliability),
        "fallback": None if table.roc is None else asdict(table.roc),
    }
