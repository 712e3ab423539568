"""Which replica a request goes to, for all replicas at once.

`affinity` is the rule of `loramux.server.replicas.placement.Affinity` over arrays; a test holds the two to
the same choices. The others are what it is compared with.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
#: No replica gets more than this many times the mean load, or this many sequences more (as the product has
#: it).
BOUND, FEW = 1.5, 4
#: (key of a blend or session, replicas) -> whose turn it is; the least comes first
Turn = Callable[[int, Ints], npt.NDArray[np.uint64]]


def mixed(key: int, replicas: Ints) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of key and replica (the finaliser of splitmix64), where the product has SHA-256: 256 of
    those a request would take longer than all the rest."""
    x = replicas.astype(np.uint64) + np.uint64((key * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    result: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return result


class Placement:
    """Chooses among the replicas that are alive; `loads` are their sequences, `missing` experts to copy."""

    def __init__(self, name: str, seed: int, turn: Turn = mixed) -> None:
        self.name = name
        #: Whether the rule looks at what would have to be copied.
        self.reads_residents = name == "affinity"
        self._turn = turn
        self._generator = np.random.default_rng([seed, 2])
        self._choose = {
            "random": self._random,
            "least-loaded": self._least_loaded,
            "session": self._session,
            "hash": self._hash,
            "affinity": self._affinity,
        }[name]

    def choose(self, alive: Ints, loads: Ints, missing: Ints, blend: int, session: int) -> int:
        """The number of a replica. `alive` are numbers, the arrays are by their place in it."""
        return int(alive[self._choose(alive, loads, missing, blend, session)])

    def _random(self, alive: Ints, loads: Ints, missing: Ints, blend: int, session: int) -> int:  # noqa: ARG002
        return int(self._generator.integers(len(alive)))

    def _least_loaded(self, alive: Ints, loads: Ints, missing: Ints, blend: int, session: int) -> int:  # noqa: ARG002
        return int(self._generator.choice(np.flatnonzero(loads == loads.min())))

    def _session(self, alive: Ints, loads: Ints, missing: Ints, blend: int, session: int) -> int:  # noqa: ARG002
        return int(self._turn(session, alive).argmin())

    def _hash(self, alive: Ints, loads: Ints, missing: Ints, blend: int, session: int) -> int:  # noqa: ARG002
        return int(self._turn(blend, alive).argmin())

    def _affinity(self, alive: Ints, loads: Ints, missing: Ints, blend: int, session: int) -> int:  # noqa: ARG002
        mean = (int(loads.sum()) + 1) / len(alive)
        limit = max(BOUND * mean, mean + FEW)
        cost = missing + (loads + 1 > limit) * (1 << 20)
        equal = np.flatnonzero(cost == cost.min())
        return int(equal[self._turn(blend, alive[equal]).argmin()])


PLACEMENTS = ("random", "least-loaded", "session", "hash", "affinity")
