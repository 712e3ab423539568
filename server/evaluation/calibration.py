"""How far a router's confidence can be trusted, and how well its fallback knows foreign texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 10


@dataclass(frozen=True, slots=True)
class Bin:
    """Texts whose confidence falls into one interval: how many, their mean confidence, the share right."""

    count: int
    confidence: float
    right: float


@dataclass(frozen=True, slots=True)
class Reliability:
    """Confidence against truth. `ece` is the expected calibration error (Naeini et al. 2015)."""

    bins: tuple[Bin, ...]
    ece: float

    @classmethod
    def of(cls, confidence: Sequence[float], right: Sequence[bool]) -> Reliability:
        """Bins of equal width over [0, 1]; empty ones are left out."""
        value, hit = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
        number = np.minimum((value * BINS).astype(int), BINS - 1)
        bins = [
            Bin(int((number == n).sum()), float(value[number == n].mean()), float(hit[number == n].mean()))
            for n in np.unique(number)
        ]
        gap = sum(one.count * abs(one.confidence - one.right) for one in bins)
        return cls(tuple(bins), gap / max(len(value), 1))


@dataclass(frozen=True, slots=True)
class Roc:
    """The fallback as a test for foreign texts, by the best score of a text.

    points: (share of own texts that fall back, share of foreign ones that do), from (0, 0) to (1, 1). auc:
    the area under them, a tie counting half. lost, caught: both shares at the threshold that is served.
    """

    points: tuple[tuple[float, float], ...]
    auc: float
    lost: float
    caught: float

    @classmethod
    def of(cls, own: Sequence[float], foreign: Sequence[float], threshold: float) -> Roc:
        """From the best scores of own and of foreign texts."""
        mine, other = np.sort(np.asarray(own, np.float64)), np.sort(np.asarray(foreign, np.float64))
        places = np.unique(np.concatenate([mine, other]))
        lost = np.searchsorted(mine, places, "right") / len(mine)
        caught = np.searchsorted(other, places, "right") / len(other)
        points = [(0.0, 0.0), *zip(lost.tolist(), caught.tolist(), strict=True)]
        below = np.searchsorted(other, mine, "left") + np.searchsorted(other, mine, "right")
        auc = float(below.mean() / 2 / len(other))
        return cls(
            tuple(_thinned(points)), auc, float((mine < threshold).mean()), float((other < threshold).mean())
        )


def _thinned(points: list[tuple[float, float]], most: int = 200) -> list[tuple[float, float]]:
    if len(points) <= most:
        return points
    chosen = np.unique(np.linspace(0, len(points) - 1, most).round().astype(int))
    return [points[number] for number in chosen]
