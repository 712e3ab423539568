"""A routing decision as JSON: `POST /v1/route`, and what every answer says of its experts."""

from typing import Any, Protocol

from loramux.router.decision import Decision


class Scored(Protocol):
    """An expert with its share; the router's numbers are None when nothing was routed."""

    @property
    def id(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def similarity(self) -> float | None: ...
    @property
    def probability(self) -> float | None: ...
    @property
    def score(self) -> float | None: ...


def explained(decision: Decision) -> dict[str, Any]:
    """A decision as JSON: what was chosen, every candidate, and why."""
    return {
        "strategy": decision.strategy,
        "policy": decision.policy,
        "temperature": decision.temperature,
        "threshold": decision.threshold,
        "experts": [scored(expert) for expert in decision.experts],
        "candidates": [scored(expert) for expert in decision.candidates],
        "fallback": decision.fallback,
        "truncated": decision.truncated,
        "margin": decision.margin,
        "entropy": decision.entropy,
        "reason": decision.reason,
    }


def scored(expert: Scored) -> dict[str, Any]:
    """One expert, as every answer has it."""
    return {
        "id": expert.id,
        "weight": expert.weight,
        "similarity": expert.similarity,
        "probability": expert.probability,
        "score": expert.score,
    }
