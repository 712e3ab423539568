"""The candidates of a large pool: arrays, of which only the best are looked at until somebody wants all."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from .errors import RouterError

Numbers = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]


class Candidate(NamedTuple):
    """One expert as scored for one text; a tuple, because each text makes one for every expert of the pool.

    similarity: raw cosine to the expert's centroid, -1..1. probability: the classifier's, 0..1, or None when
    it was not asked. score: what the strategy ranks by. weight: its share in the blend, 0 when it was not
    chosen.
    """

    id: str
    weight: float
    similarity: float
    probability: float | None
    score: float


class Ranked(Sequence[Candidate]):
    """Candidates, best first, equal ones in the pool's order; each is made when it is looked at.

    A list of them takes tens of milliseconds at 10,000 experts, and a request needs the first few.
    """

    def __init__(
        self,
        names: Sequence[str | None],
        similarity: npt.NDArray[np.float32],
        probability: npt.NDArray[np.float32] | None,
        scores: Numbers,
        *,
        places: Places | None = None,
        weights: Sequence[float] = (),
    ) -> None:
        """All by the expert's place in the pool [k]; `places`: those that take part, rising; None for all.
        `weights` are those of the first.

        Raises RouterError when a score is not finite.
        """
        if not np.isfinite(scores).all():
            raise RouterError("scores must be finite, one for each expert")
        self._names = names
        self._similarity = similarity
        self._probability = probability
        self._scores = scores
        self._places = np.arange(len(scores)) if places is None else places
        self._weights = weights

    @property
    def names(self) -> Sequence[str | None]:
        """Of all experts by their place in the pool; None for one that is not served."""
        return self._names

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, at: int) -> Candidate: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Candidate, ...]: ...
    def __getitem__(self, at: int | slice) -> Candidate | tuple[Candidate, ...]:
        if isinstance(at, slice):
            wanted = range(*at.indices(len(self)))
            order = self._first(max(wanted, default=-1) + 1)
            return tuple(self._candidate(rank, order[rank]) for rank in wanted)
        rank = range(len(self))[at]
        return self._candidate(rank, self._first(rank + 1)[rank])

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self[:])

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def best(self, count: int) -> list[float]:
        """The largest scores, at most `count`."""
        order = self._first(count)[:count]
        return [float(self._scores[place]) for place in order]

    def weighted(self, weights: Sequence[float]) -> "Ranked":
        """The same with these weights for the first, 0 for the others."""
        result = Ranked(
            self._names, self._similarity, self._probability, self._scores,
            places=self._places, weights=weights,
        )  # fmt: skip
        result.__dict__.update({k: v for k, v in self.__dict__.items() if k in ("_head", "_order")})
        return result

    def among(self, served: Mapping[str, str]) -> "Ranked":
        """Those that are served, under the names they are served by; no weights."""
        names = [None if name is None else served.get(name) for name in self._names]
        present = np.array([name is not None for name in names], np.bool_)
        places = self._places[present[self._places]]
        return Ranked(names, self._similarity, self._probability, self._scores, places=places)

    def entropy(self, temperature: float) -> float:
        """As `policy.entropy`, of all that take part."""
        scores = self._scores[self._places]
        shifted = (scores - scores.max()) / temperature
        powers = np.exp(shifted)
        total = float(powers.sum())
        return math.log(total) - float(powers @ shifted) / total

    def _first(self, count: int) -> Places:
        """The places of at least the first `count`, in order."""
        if len(self._head) >= min(count, len(self)):
            return self._head
        return self._order

    @cached_property
    def _head(self) -> Places:
        """Enough for a blend and its margin."""
        count = min(72, len(self))
        scores = self._scores[self._places]
        least = np.partition(scores, len(scores) - count)[len(scores) - count] if count else 0.0
        near = np.flatnonzero(scores >= least)  # of equal scores all, so that the first of them are kept
        ordered = near[np.argsort(-scores[near], kind="stable")][:count]
        result: Places = self._places[ordered]
        return result

    @cached_property
    def _order(self) -> Places:
        result: Places = self._places[np.argsort(-self._scores[self._places], kind="stable")]
        return result

    def _candidate(self, rank: int, place: np.int64) -> Candidate:
        name = self._names[int(place)]
        assert name is not None
        probability = None if self._probability is None else float(self._probability[place])
        weight = self._weights[rank] if rank < len(self._weights) else 0.0
        return Candidate(
            name, weight, float(self._similarity[place]), probability, float(self._scores[place])
        )
