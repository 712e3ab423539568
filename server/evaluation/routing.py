"""Does the router find the expert of the right domain, and does it know when it does?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loramux.router.decision import STRATEGIES, Decision, RoutingOptions, Strategy
from loramux.router.router import Router
from loramux.server.evaluation.calibration import Reliability, Roc

NO_EXPERT = "(base)"


@dataclass(frozen=True)
class RoutingTable:
    """Prompts of each domain (rows) by the domain of the expert chosen first (columns).

    reliability: of the first expert's probability, over the domains that have an expert and the texts that
    are routed. roc: None without foreign texts.
    """

    strategy: str
    counts: Mapping[str, Mapping[str, int]]
    reliability: Reliability | None = None
    roc: Roc | None = None

    def accuracy(self, domain: str | None = None) -> float:
        """Share of prompts whose first expert belongs to their domain, of one domain or of all prompts."""
        rows = self.counts if domain is None else {domain: self.counts[domain]}
        right = sum(row.get(name, 0) for name, row in rows.items())
        return right / max(1, sum(sum(row.values()) for row in rows.values()))


def expert_domains(router: Router, texts: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The domain that fills each expert's cluster: its own name where a domain is called so, else the one
    most of the texts nearest to its centroid come from.

    Args:
        router: of the pool; its centroids decide, not its classifier.
        texts: domain -> texts, best those that the pool was made from.
    """
    nearest: dict[str, Counter[str]] = {}
    options = RoutingOptions(strategy="similarity", top_m=1, threshold=-1.0)
    for domain, examples in texts.items():
        for decision in router.decide(examples, options):
            nearest.setdefault(decision.candidates[0].id, Counter())[domain] += 1
    found = {expert: counts.most_common(1)[0][0] for expert, counts in nearest.items()}
    return {
        expert: expert if expert in texts else found[expert]
        for expert in router.experts
        if expert in texts or expert in found
    }


def routing_tables(
    router: Router,
    texts: Mapping[str, Sequence[str]],
    domains: Mapping[str, str],
    foreign: Sequence[str] = (),
) -> dict[str, RoutingTable]:
    """A table for each strategy, with the pool's calibrated settings.

    Args:
        router: of the pool.
        texts: domain -> routing texts.
        domains: expert -> the domain it is for.
        foreign: texts that no expert is for.
    """
    tables: dict[str, RoutingTable] = {}
    for strategy in STRATEGIES if router.classifier is not None else STRATEGIES[:1]:
        options = RoutingOptions(strategy=strategy)
        decisions = {domain: router.decide(examples, options) for domain, examples in texts.items()}
        others = router.decide(foreign, options) if foreign else []
        tables[strategy] = routing_table(strategy, decisions, domains, others)
    return tables


def routing_table(
    strategy: Strategy,
    decisions: Mapping[str, Sequence[Decision]],
    domains: Mapping[str, str],
    foreign: Sequence[Decision] = (),
) -> RoutingTable:
    """Count first choices by domain; a fallback to the base is a column of its own, and never right."""
    counts = {
        domain: Counter(
            domains.get(d.experts[0].id, d.experts[0].id) if d.experts else NO_EXPERT for d in chosen
        )
        for domain, chosen in decisions.items()
    }
    covered = set(domains.values())
    own = [(domain, one) for domain, chosen in decisions.items() if domain in covered for one in chosen]
    confident = [
        (one.experts[0].probability, domains.get(one.experts[0].id) == domain)
        for domain, one in own
        if one.experts and one.experts[0].probability is not None
    ]
    reliability = (
        Reliability.of([p for p, _ in confident], [hit for _, hit in confident]) if confident else None
    )
    roc = None
    if foreign and own:
        roc = Roc.of([_best(one) for _, one in own], [_best(one) for one in foreign], foreign[0].threshold)
    return RoutingTable(strategy, counts, reliability, roc)


def _best(decision: Decision) -> float:
    """Of a text that nothing can be read of, the fallback is certain."""
    return float("-inf") if decision.blank else decision.candidates[0].score
