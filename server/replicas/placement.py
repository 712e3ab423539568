"""Which replica a request goes to: where its blend's experts are, unless that one has too much to do.

Rendezvous hashing (Thaler and Ravishankar, 1998) gives each blend a home that stays when others come and go;
the bound on loads is that of Mirrokni, Thorup and Zadimoghaddam, "Consistent Hashing with Bounded Loads"
(2018).
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from loramux.adapters.blend import Blend
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.sparse.token_mixtures import TokenMixture
from loramux.server.leases import Mixture, SparseChoice

#: No replica gets more than this many times the mean load, or this many sequences more where that is more: a
#: step of a few takes hardly longer than a step of one.
BOUND, FEW = 1.5, 4


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request needs resident.

    Attributes:
        key: of its mixture, which says where its home is.
        parts: what occupies rows of the arena: a content hash or, for an inexact merge, its blend's key, and
            how many rows.
    """

    key: str = ""
    parts: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, mixture: Mixture | None, experts: Mapping[str, LoraAdapter]) -> "Wish":
        """Of a mixture; of the bare base, where it is None."""
        match mixture:
            case None:
                return cls()
            case SparseChoice():
                return cls(mixture.id)
            case TokenMixture():
                return cls(mixture.key)
        ranks = {part.content_hash: _rank(experts, part.expert_id) for part in mixture.parts}
        if mixture.method == "exact":
            return cls(mixture.key, tuple(ranks.items()))
        return cls(mixture.key, ((mixture.key, _merged_rank(mixture, list(ranks.values()))),))


def _rank(experts: Mapping[str, LoraAdapter], id: str) -> int:
    expert = experts.get(id)
    return 0 if expert is None else expert.max_rank


def _merged_rank(blend: Blend, ranks: Sequence[int]) -> int:
    return blend.rank or max(ranks, default=0)


class Shadow:
    """What is resident at a replica, as its leases let the edge conclude: the arena's rows, the longest
    unused first out. It may err, which costs a copy; nothing is computed by it."""

    def __init__(self, rows: int, resident: Iterable[tuple[str, int]] = ()) -> None:
        self._rows = rows
        self._parts: OrderedDict[str, int] = OrderedDict(resident)
        self._used = sum(self._parts.values())

    def missing(self, wish: Wish) -> int:
        """Rows that would have to be copied in."""
        return sum(rows for key, rows in wish.parts if key not in self._parts)

    def leased(self, wish: Wish) -> None:
        """A lease of this was granted there."""
        for key, rows in wish.parts:
            if key not in self._parts:
                self._parts[key] = rows
                self._used += rows
            self._parts.move_to_end(key)
        while self._used > self._rows and len(self._parts) > len(wish.parts):
            _, rows = self._parts.popitem(last=False)
            self._used -= rows


class Place(Protocol):
    """What is read of a replica."""

    @property
    def number(self) -> int: ...
    @property
    def load(self) -> int: ...
    @property
    def shadow(self) -> Shadow: ...


Chosen = TypeVar("Chosen", bound=Place)


class Affinity:
    """Replicas in the order in which they should be tried for a request."""

    def __init__(self, bound: float = BOUND) -> None:
        self._bound = bound

    def order(self, replicas: Sequence[Chosen], wish: Wish) -> list[Chosen]:
        """First those with room below the bound, of these the one that has to copy least, and of equals the
        one whose turn it is by the blend's digest."""
        mean = (sum(replica.load for replica in replicas) + 1) / len(replicas)
        limit = max(self._bound * mean, mean + FEW)
        return sorted(
            replicas,
            key=lambda one: (one.load + 1 > limit, one.shadow.missing(wish), _turn(wish.key, one.number)),
        )


def _turn(key: str, number: int) -> bytes:
    return hashlib.sha256(f"{key} {number}".encode()).digest()
