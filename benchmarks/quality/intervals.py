"""From records to numbers: mean losses over domains, and differences with bootstrap intervals."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
DRAWS = 4000
_LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def decides(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Measured:
    """One cell with all its seeds."""

    name: str
    records: Mapping[int, Mapping[str, Any]]

    @cached_property
    def seeds(self) -> list[int]:
        return sorted(self.records)

    @property
    def any(self) -> Mapping[str, Any]:
        """The record of the first seed."""
        return self.records[self.seeds[0]]

    def loss(self) -> float:
        """Nats per answer token of each domain, averaged over domains, then over seeds."""
        return float(np.mean([_macro(self.records[seed]["rows"]) for seed in self.seeds]))

    def mean(self, key: str) -> float | None:
        """A number of the record (`weight`, `right`), averaged over seeds; None where it has none."""
        found = [self.records[seed][key] for seed in self.seeds if key in self.records[seed]]
        return float(np.mean(found)) if found else None

    def exact(self) -> tuple[float, int] | None:
        """Share of the rows asked that were answered word for word, and how many were asked with a seed."""
        asked = [
            row[2]
            for seed in self.seeds
            for rows in self.records[seed]["rows"].values()
            for row in rows
            if row[2] is not None
        ]
        return (float(np.mean(asked)), len(asked) // len(self.seeds)) if asked else None

    def choice(self, benchmark: str | None, which: int) -> tuple[float, int] | None:
        """acc (0) or acc_norm (1) of a benchmark, or of all with equal weight, and how many questions."""
        shares, count = [], 0
        for seed in self.seeds:
            asked = self.records[seed].get("choices") or {}
            names = asked if benchmark is None else [name for name in asked if name == benchmark]
            for name in names:
                shares.append(np.mean([row[which] for row in asked[name]]))
                count += len(asked[name])
        return (float(np.mean(shares)), count // len(self.seeds)) if shares else None


class Results:
    """The records of a setting, as `benchmarks/results/quality-<setting>.json` holds them."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        cells: dict[str, dict[int, Mapping[str, Any]]] = {}
        for record in content["cells"]:
            cells.setdefault(record["cell"]["name"], {})[record["seed"]] = record
        self.cells = {name: Measured(name, records) for name, records in cells.items()}

    @classmethod
    def read(cls, file: Path) -> "Results":
        """From a file."""
        return cls(json.loads(file.read_text()))

    def difference(self, a: str, b: str) -> Interval | None:
        """Loss of `a` less that of `b` (negative: `a` is better), over the seeds that both have.

        Rows are drawn within their domain, the same for both and for every seed, and seeds are drawn too. A
        cell of one seed whose model is untrained stands beside every seed of the other.
        None where one of them is not measured.
        """
        if a not in self.cells or b not in self.cells:
            return None
        pairs = paired(self.cells[a], self.cells[b])
        if not pairs:
            return None
        draw = np.random.default_rng(0)
        domains = sorted(pairs[0][0]["rows"])
        losses = np.zeros((2, len(pairs), DRAWS))
        for domain in domains:
            tables = [[_table(one["rows"][domain]) for one in pair] for pair in pairs]
            rows = draw.integers(0, len(tables[0][0]), (DRAWS, len(tables[0][0])))
            for number, pair in enumerate(tables):
                for side, table in enumerate(pair):
                    drawn = table[rows].sum(axis=1)
                    losses[side, number] += drawn[:, 0] / np.maximum(drawn[:, 1], 1)
        gaps = (losses[0] - losses[1]) / len(domains)  # [seeds, draws]
        seeds = draw.integers(0, len(pairs), (len(pairs), DRAWS))
        found = np.take_along_axis(gaps, seeds, axis=0).mean(axis=0)
        value = float(np.mean([_macro(one["rows"]) - _macro(other["rows"]) for one, other in pairs]))
        tail = (1 - _LEVEL) / 2
        low, high = np.quantile(found, [tail, 1 - tail])
        return Interval(value, float(low), float(high))

    def gain_share(self, name: str, oracle: str, base: str) -> float | None:
        """How much of the loss that `oracle` saves over `base` a cell saves too."""
        if any(one not in self.cells for one in (name, oracle, base)):
            return None
        floor, best = self.cells[base].loss(), self.cells[oracle].loss()
        return (floor - self.cells[name].loss()) / (floor - best) if floor > best else None

    def best_expert(self, name: str) -> tuple[float, float] | None:
        """Of a cell that asked each expert: the loss if every domain had its best one, and every row."""
        if name not in self.cells:
            return None
        record = self.cells[name].any
        experts = list(record["experts"].values())
        by_domain, by_row = [], []
        for domain in experts[0]["rows"]:
            nats = np.stack([_table(one["rows"][domain])[:, 0] for one in experts])  # [experts, rows]
            tokens = _table(experts[0]["rows"][domain])[:, 1].sum()
            by_domain.append(nats.sum(axis=1).min() / tokens)
            by_row.append(nats.min(axis=0).sum() / tokens)
        return float(np.mean(by_domain)), float(np.mean(by_row))


def paired(one: Measured, other: Measured) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Records of equal seeds; an untrained cell of one seed beside all of the other's."""
    fixed = [cell.any for cell in (one, other) if _untrained(cell)]
    if fixed and len(fixed) == 1:
        trained = other if _untrained(one) else one
        return [
            (one.any, trained.records[seed]) if trained is other else (trained.records[seed], other.any)
            for seed in trained.seeds
        ]
    return [(one.records[seed], other.records[seed]) for seed in one.seeds if seed in other.records]


def _untrained(cell: Measured) -> bool:
    return cell.name.partition(" ")[0] == "base"


def _table(rows: Sequence[Sequence[Any]]) -> Numbers:
    """[rows, 2]: nats and tokens."""
    return np.array([[row[0], row[1]] for row in rows], np.float64)


def _macro(rows: Mapping[str, Sequence[Sequence[Any]]]) -> float:
    tables = [_table(group).sum(axis=0) for group in rows.values()]
    return float(np.mean([nats / max(tokens, 1) for nats, tokens in tables]))
