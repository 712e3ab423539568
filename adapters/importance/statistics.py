"""What the LoRACoE paper reads off importance scores: variance by dimension, correlations, concentration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from loramux.adapters.importance.measure import Importance, Scores

_CONSTANT = 1e-6


@dataclass(frozen=True, slots=True)
class Variance:
    """Mean variance of the importance along the ranks and along the features (its figure 2), each divided by
    the squared mean importance of the module, so that modules and tasks can be averaged."""

    rank: float
    features: float


def variance(scores: Scores) -> Variance:
    """Of one module: the mean of what A and B have. Along the ranks: for every feature, over the ranks."""
    parts = [_variance(part.double()) for part in (scores.a, scores.bt)]
    return Variance(*(sum(column) / len(parts) for column in zip(*parts, strict=True)))


def _variance(values: Tensor) -> tuple[float, float]:
    scale = float(values.mean()) ** 2
    if not scale or min(values.shape) < 2:
        return 0.0, 0.0
    return float(values.var(dim=0).mean()) / scale, float(values.var(dim=1).mean()) / scale


def mean_variance(tasks: Sequence[Importance], paths: Sequence[str]) -> Variance:
    """Over modules and tasks."""
    found = [variance(task.scores[path]) for task in tasks for path in paths]
    count = max(1, len(found))
    return Variance(sum(one.rank for one in found) / count, sum(one.features for one in found) / count)


def task_correlation(tasks: Sequence[Importance], paths: Sequence[str], *, by_rank: bool = False) -> Tensor:
    """Pearson correlation of the scores of two tasks inside a module, averaged over modules: `[tasks, tasks]`
    (its figure 3, top). `by_rank` compares ranks; without it, single parameters."""
    whole = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    for path in paths:
        rows = [_flat(task.scores[path], by_rank=by_rank) for task in tasks]
        whole += correlation(torch.stack(rows))
    return whole / max(1, len(paths))


def rank_correlation(tasks: Sequence[Importance], path: str) -> Tensor:
    """Pearson correlation of two ranks of a module over the tasks, `[R, R]` (its figure 3, bottom).

    Of each task the ranks' shares of the module's importance are taken: a task with steeper gradients would
    make all ranks rise together. Shares sum to 1, so unrelated ranks come out at -1 / (R - 1) on average.
    """
    shares = torch.stack([_shares(task.scores[path].ranks) for task in tasks])
    return correlation(shares.T)


def correlation(rows: Tensor) -> Tensor:
    """Pearson correlation of rows `[n, values]`, float64; 0 with a row that varies less than float32 can
    tell."""
    rows = rows.double()
    centred = rows - rows.mean(1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    varies = length > _CONSTANT * rows.norm(dim=1, keepdim=True)
    unit = torch.where(varies, centred / length.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return (unit @ unit.T).clamp(-1, 1)


@dataclass(frozen=True, slots=True)
class Concentration:
    """How many ranks of a model matter for a task, as parts of all its ranks (its figure 4).

    effective: 1 / Σ share². half, most: the fewest that hold 50 % and 90 % of the importance.
    """

    effective: float
    half: float
    most: float


def concentration(shares: Tensor) -> Concentration:
    """Of shares `[R]` that sum to 1."""
    count = len(shares)
    held = shares.sort(descending=True).values.cumsum(0)
    half, most = (int((held < level - 1e-12).sum()) + 1 for level in (0.5, 0.9))
    return Concentration(1 / float(shares.square().sum()) / count, half / count, most / count)


def rank_shares(task: Importance) -> Tensor:
    """Of every rank of the model, its share of the whole importance, float64, modules one after the other."""
    return _shares(torch.cat([scores.ranks for scores in task.scores.values()]))


def top_overlap(shares: Mapping[str, Tensor], part: float = 0.1) -> float | None:
    """Of the most important `part` of the ranks: how many two tasks share, intersection over union, the mean
    over all pairs; None with one task. Chance gives part / (2 - part)."""
    count = max(1, round(part * len(next(iter(shares.values())))))
    tops = [set(one.topk(count).indices.tolist()) for one in shares.values()]
    found = [len(one & other) / len(one | other) for one, other in combinations(tops, 2)]
    return sum(found) / len(found) if found else None


def _shares(values: Tensor) -> Tensor:
    whole = values.sum()
    return values / whole if whole > 0 else torch.full_like(values, 1 / len(values))


def _flat(scores: Scores, *, by_rank: bool) -> Tensor:
    return scores.ranks if by_rank else torch.cat([scores.a.flatten(), scores.bt.flatten()])
