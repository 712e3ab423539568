"""Metrics of the experts, read when scraped: where each one is, which the requests in hand use, what each is
worth."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from loramux.server.job import Job, State
from loramux.server.leases import ExpertStore, SparseStore

#: The tiers as vLLM calls them; `gpu` is the device that computes, whichever that is.
DEVICE, HOST = "gpu", "cpu"
#: Experts that have series of their own; of a larger pool those on the device come first.
MAX_EXPERTS = 256


@dataclass(frozen=True, slots=True)
class ExpertPlace:
    """One expert or sparse model that can be asked for by its id.

    Attributes:
        resident: whether it is on the device.
        kept: nothing can push it out.
        gain: what it is worth on held-out rows of its own domain, where the pool says so: nats per answer
            token that the base loses more than it.
    """

    rank: int
    resident: bool
    kept: bool = False
    gain: float | None = None


@dataclass(frozen=True, slots=True)
class ExpertStats:
    """A snapshot for `/metrics`. `room`: how many experts and sparse models fit on the device at once."""

    places: Mapping[str, ExpertPlace] = field(default_factory=dict)
    room: int = 0


def expert_stats(residency: ExpertStore, shelf: SparseStore, gains: Mapping[str, float]) -> ExpertStats:
    """Of what is loaded now; `gains` by content hash, for a name may come to mean something else."""
    stats = residency.stats()
    resident = frozenset(stats.resident_experts)
    places = {
        name: ExpertPlace(expert.max_rank, name in resident, gain=gains.get(expert.content_hash))
        for name, expert in residency.experts.items()
    }
    places |= {name: ExpertPlace(card.rank, True, kept=True) for name, card in shelf.cards.items()}
    return ExpertStats(places, stats.room + len(shelf.cards))


class ExpertCollector(Collector):
    """The names are vLLM's, where it has one: schedulers before several servers send a request by them to one
    that has its expert. At most `MAX_EXPERTS` experts are named, those on the device first, which is what a
    scheduler asks for; the numbers of experts count them all."""

    def __init__(self, base: str, stats: Callable[[], ExpertStats], live: Mapping[str, Job]) -> None:
        self._base = base
        self._stats = stats
        self._live = live

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        yield from self._residency(stats)
        yield self._requests(stats)
        gains = GaugeMetricFamily(
            "loramux_expert_gain_nats",
            "Loss of the base less the expert's, on held-out rows of its domain.",
            labels=("expert",),
        )
        for name, place in _shown(stats):
            if place.gain is not None:
                gains.add_metric((name,), place.gain)
        yield gains

    def _residency(self, stats: ExpertStats) -> Iterable[Metric]:
        loaded = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            "Experts and sparse models by where they are.",
            labels=("adapter_name", "level", "pinned", "rank"),
        )
        for name, place in _shown(stats):
            level = DEVICE if place.resident else HOST
            loaded.add_metric((name, level, str(place.kept).lower(), str(place.rank)), 1)
        yield loaded
        resident = sum(place.resident for place in stats.places.values())
        for name, text, value in (
            ("num_gpu_loaded_lora_adapters", "Experts on the device.", resident),
            ("num_cpu_loaded_lora_adapters", "Experts on the host alone.", len(stats.places) - resident),
            ("max_gpu_lora_adapters", "Experts that fit on the device at once.", stats.room),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=("model_name",))
            gauge.add_metric((self._base,), value)
            yield gauge

    def _requests(self, stats: ExpertStats) -> Metric:
        """The inference gateway's protocol: names in labels, the time as the value."""
        running: set[str] = set()
        waiting: set[str] = set()
        for job in self._live.values():
            (running if job.state in (State.PREFILL, State.DECODE) else waiting).update(job.experts)
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Experts of running and waiting requests; the value is the time.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        info.add_metric((str(stats.room), ",".join(sorted(running)), ",".join(sorted(waiting))), time.time())
        return info


def _shown(stats: ExpertStats) -> list[tuple[str, ExpertPlace]]:
    """The experts that are named, in the order in which they were loaded but for those on the device."""
    places = list(stats.places.items())
    if len(places) > MAX_EXPERTS:
        places = sorted(places, key=lambda item: (not item[1].kept, not item[1].resident))[:MAX_EXPERTS]
    return places
