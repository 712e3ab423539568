"""Does the router find the expert of the right domain?"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loramux.adapters.training.rows import Row, user_text
from loramux.router.decision import Decision, RoutingOptions, Strategy
from loramux.router.router import Router

NO_EXPERT = "(base)"


@dataclass(frozen=True)
class RoutingTable:
    """Prompts of each domain (rows) by the domain of the expert chosen first (columns)."""

    strategy: str
    counts: Mapping[str, Mapping[str, int]]

    def accuracy(self, domain: str | None = None) -> float:
        """Share of prompts whose first expert belongs to their domain, of one domain or of all prompts."""
        rows = self.counts if domain is None else {domain: self.counts[domain]}
        right = sum(row.get(name, 0) for name, row in rows.items())
        return right / max(1, sum(sum(row.values()) for row in rows.values()))


def expert_domains(router: Router, rows: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    """The domain that fills each expert's cluster: the one most of the rows nearest to its centroid come
    from.

    Args:
        router: of the pool; its centroids decide, not its classifier.
        rows: domain -> rows, normally the ones the pool was built from.
    """
    nearest: dict[str, Counter[str]] = {}
    options = RoutingOptions(strategy="similarity", top_m=1, threshold=-1.0)
    for domain, examples in rows.items():
        for decision in router.decide([user_text(row) for row in examples], options):
            nearest.setdefault(decision.experts[0].id, Counter())[domain] += 1
    return {expert: counts.most_common(1)[0][0] for expert, counts in nearest.items()}


def decide_all(
    router: Router, rows: Mapping[str, Sequence[Row]], strategy: Strategy
) -> dict[str, list[Decision]]:
    """The decision for every row, by domain, with the pool's calibrated settings."""
    options = RoutingOptions(strategy=strategy)
    return {
        domain: router.decide([user_text(row) for row in examples], options)
        for domain, examples in rows.items()
    }


def routing_table(
    strategy: str, decisions: Mapping[str, Sequence[Decision]], domains: Mapping[str, str]
) -> RoutingTable:
    """Count first choices by domain; a fallback to the base is a column of its own, and never right."""
    counts = {
        domain: Counter(
            domains.get(d.experts[0].id, d.experts[0].id) if d.experts else NO_EXPERT for d in chosen
        )
        for domain, chosen in decisions.items()
    }
    return RoutingTable(strategy, counts)
