"""What an analysis found, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from loramux.adapters.importance.measure import Importance
from loramux.adapters.importance.statistics import (
    Concentration,
    Variance,
    concentration,
    mean_variance,
    rank_correlation,
    rank_shares,
    task_correlation,
    top_overlap,
)

#: Significant digits of the JSON.
_DIGITS = 4


@dataclass(frozen=True, slots=True)
class System:
    """One adapter or sparse model, with its importance for every task.

    Attributes:
        kind: lora, loracoe, loramoe, mola or mixlora.
        numbers: how many parameters of factors it has; routers are not measured.
        tasks: by name, in order.
    """

    name: str
    kind: str
    numbers: int
    tasks: Mapping[str, Importance]

    @property
    def paths(self) -> list[str]:
        """Its modules, in the order of the layers."""
        return list(next(iter(self.tasks.values())).scores)

    @property
    def kinds(self) -> dict[str, list[str]]:
        """Modules by their last name: q_proj, up_proj and so on."""
        found: dict[str, list[str]] = {}
        for path in self.paths:
            found.setdefault(path.rpartition(".")[2], []).append(path)
        return found

    @property
    def middle(self) -> list[str]:
        """Of every kind of module, the one in the middle layer, whose ranks are shown."""
        return [paths[len(paths) // 2] for paths in self.kinds.values()]

    def variances(self) -> dict[str, Variance]:
        """By kind of module."""
        tasks = list(self.tasks.values())
        return {kind: mean_variance(tasks, paths) for kind, paths in self.kinds.items()}

    def between_tasks(self, *, by_rank: bool = False) -> dict[str, Tensor]:
        """Correlation of tasks `[tasks, tasks]`, by kind of module."""
        tasks = list(self.tasks.values())
        return {kind: task_correlation(tasks, paths, by_rank=by_rank) for kind, paths in self.kinds.items()}

    def between_ranks(self) -> dict[str, Tensor]:
        """Correlation of ranks `[R, R]` over the tasks, of every module."""
        tasks = list(self.tasks.values())
        return {path: rank_correlation(tasks, path) for path in self.paths}

    def shares(self) -> dict[str, Tensor]:
        """Of every rank of the model its share of the importance, by task."""
        return {name: rank_shares(task) for name, task in self.tasks.items()}

    def concentrations(self) -> dict[str, Concentration]:
        """How many ranks matter, by task."""
        return {name: concentration(shares) for name, shares in self.shares().items()}

    def json(self) -> dict[str, Any]:
        """Everything that the page shows, and the importance of every rank."""
        ranks = self.between_ranks()
        off = {path: off_diagonal(matrix) for path, matrix in ranks.items()}
        return {
            "name": self.name,
            "kind": self.kind,
            "numbers": self.numbers,
            "ranks": len(next(iter(self.shares().values()))),
            "loss": {name: rounded(task.loss) for name, task in self.tasks.items()},
            "variance": {
                kind: {"rank": rounded(one.rank), "features": rounded(one.features)}
                for kind, one in self.variances().items()
            },
            "task_correlation": {
                kind: rounded(matrix.tolist()) for kind, matrix in self.between_tasks().items()
            },
            "task_correlation_by_rank": {
                kind: rounded(matrix.tolist()) for kind, matrix in self.between_tasks(by_rank=True).items()
            },
            "rank_correlation": {
                path: {
                    "mean": rounded(float(one.mean())),
                    "negative": rounded(float((one < 0).double().mean())),
                    "matrix": rounded(ranks[path].tolist()) if path in self.middle else None,
                }
                for path, one in off.items()
                if len(one)
            },
            "concentration": {
                name: {"effective": rounded(c.effective), "half": rounded(c.half), "most": rounded(c.most)}
                for name, c in self.concentrations().items()
            },
            "top_tenth_overlap": rounded(top_overlap(self.shares())),
            "rank_importance": {
                name: {path: rounded(scores.ranks.tolist()) for path, scores in task.scores.items()}
                for name, task in self.tasks.items()
            },
        }


@dataclass(frozen=True, slots=True)
class Analysis:
    """Several systems over the same tasks."""

    pool: str
    base: str
    systems: Sequence[System]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        return list(self.systems[0].tasks)

    def json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "pool": self.pool,
            "base": self.base,
            "about": dict(self.about),
            "systems": [system.json() for system in self.systems],
        }


def off_diagonal(matrix: Tensor) -> Tensor:
    """The upper triangle without the diagonal, as a vector."""
    count = len(matrix)
    return matrix[[row for row in range(count) for _ in range(row + 1, count)],
                  [column for row in range(count) for column in range(row + 1, count)]]  # fmt: skip


def rounded(value: Any) -> Any:
    """Numbers, also in lists, to a few significant digits."""
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
