"""What all replicas together have done, also those that are no more."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from loramux.adapters.residency import ResidencyStats
from loramux.adapters.sparse.shelf import SparseStats
from loramux.adapters.sparse.tally import ExpertLoad
from loramux.server.engine.protocol import EngineStats
from loramux.server.replicas.frames import Message

_ENGINE_COUNTERS = (
    "steps", "prefill_tokens", "decode_tokens", "prefix_hit_tokens", "step_seconds", "preemptions",
)  # fmt: skip
_RESIDENCY_COUNTERS = ("hits", "misses", "evictions", "moved_bytes")


@dataclass(eq=False)
class Totals:
    """Sums over replicas. Counters of a life that is over are kept, so that sums never fall.

    Attributes:
        lives: the statistics of the replicas that live, as they told them last.
        dead: why there will be none any more; stalled: why there is none now.
    """

    lives: Callable[[], Iterable[Message]]
    dead: str | None = None
    stalled: str | None = None
    _past: Counter[str] = field(default_factory=Counter)
    _past_tokens: dict[str, Counter[int]] = field(default_factory=dict)

    def bury(self, stats: Message) -> None:
        """A life is over."""
        if not stats:
            return
        self._past.update({name: stats["engine"][name] for name in _ENGINE_COUNTERS})
        self._past.update({name: stats["residency"][name] for name in _RESIDENCY_COUNTERS})
        for id, (tokens, _) in stats["sparse"]["loads"].items():
            self._past_tokens.setdefault(id, Counter()).update(dict(enumerate(tokens)))

    def engine(self) -> EngineStats:
        """Sums; of the use of the cache, the mean by size."""
        lives = [stats["engine"] for stats in self.lives() if stats]
        pages = sum(one["kv_pages"] for one in lives)
        used = sum(one["kv_usage"] * one["kv_pages"] for one in lives)
        return EngineStats(
            running=sum(one["running"] for one in lives),
            waiting=sum(one["waiting"] for one in lives),
            kv_usage=used / pages if pages else 0.0,
            kv_pages=pages,
            kv_page_tokens=max((one["kv_page_tokens"] for one in lives), default=0),
            dead=self.dead,
            stalled=self.stalled,
            **{name: self._sum(name, lives) for name in _ENGINE_COUNTERS},
        )

    def residency(self) -> ResidencyStats:
        """Sums; an expert is resident where any replica has it."""
        lives = [stats["residency"] for stats in self.lives() if stats]
        summed = {
            one.name: self._sum(one.name, lives)
            for one in fields(ResidencyStats)
            if one.name != "resident_experts"
        }
        resident = dict.fromkeys(id for one in lives for id in one["resident_experts"])
        return ResidencyStats(**summed, resident_experts=tuple(resident))

    def sparse(self) -> SparseStats:
        """Sums; of the entropy, the mean by tokens."""
        lives = [stats["sparse"] for stats in self.lives() if stats]
        loads: dict[str, ExpertLoad] = {}
        for id in dict.fromkeys(id for one in lives for id in one["loads"]):
            mine = [one["loads"][id] for one in lives if id in one["loads"]]
            tokens = Counter(self._past_tokens.get(id, Counter()))
            for served, _ in mine:
                tokens.update(dict(enumerate(served)))
            weight = sum(sum(served) for served, _ in mine)
            entropy = sum(sum(served) * mean for served, mean in mine) / weight if weight else 0.0
            loads[id] = ExpertLoad(tuple(tokens[i] for i in sorted(tokens)), entropy)
        return SparseStats(sum(one["nbytes"] for one in lives), loads)

    def token_bytes(self) -> dict[str, int]:
        """Sums, by method."""
        found = Counter[str]()
        for stats in self.lives():
            found.update(stats.get("token_bytes", {}))
        return dict(found)

    def _sum(self, name: str, lives: Iterable[dict[str, Any]]) -> Any:
        return self._past[name] + sum(one[name] for one in lives)
