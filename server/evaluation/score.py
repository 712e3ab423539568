"""What one mixture did on one item, and what that comes to over a domain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loramux.server.evaluation.items import AnswerItem, Item


@dataclass(frozen=True, slots=True)
class Score:
    """Of a row: nats over its answer tokens and how many they are, and whether a greedy answer was the row's
    own (None: not asked). Of a question: nats of each choice's log-likelihood, negated."""

    nats: float = 0.0
    tokens: int = 0
    exact: bool | None = None
    choices: Sequence[float] = ()

    def json(self) -> dict[str, Any]:
        """As it is stored."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class DomainScore:
    """One system on one domain; None where the domain has no such items.

    loss: nats per answer token. exact: share of the rows asked that were answered word for word. acc,
    acc_norm: share of the questions whose right choice is the likeliest, as it is and per byte.
    """

    rows: int
    tokens: int
    nats: float
    loss: float | None
    exact: float | None
    exact_rows: int
    acc: float | None
    acc_norm: float | None

    @classmethod
    def of(cls, items: Sequence[Item], scores: Sequence[Score]) -> DomainScore:
        """The sums over a domain."""
        nats = math.fsum(score.nats for score in scores)
        tokens = sum(score.tokens for score in scores)
        asked = [score.exact for score in scores if score.exact is not None]
        right: list[bool] = []
        normed: list[bool] = []
        for item, score in zip(items, scores, strict=True):
            if isinstance(item, AnswerItem) or not score.choices:
                continue
            costs = list(score.choices)
            right.append(costs.index(min(costs)) == item.answer)
            per_byte = [cost / size for cost, size in zip(costs, item.sizes, strict=True)]
            normed.append(per_byte.index(min(per_byte)) == item.answer)
        return cls(
            rows=len(items),
            tokens=tokens,
            nats=nats,
            loss=nats / tokens if tokens else None,
            exact=_share(asked),
            exact_rows=len(asked),
            acc=_share(right),
            acc_norm=_share(normed),
        )


def standard_error(share: float, rows: int) -> float:
    """Of a share over rows, √(p (1 - p) / n)."""
    return math.sqrt(max(share * (1 - share), 0.0) / max(rows, 1))


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
