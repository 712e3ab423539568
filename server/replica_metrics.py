"""Metrics of the replicas behind an edge, read when scraped; a server without any has none."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """One number's, over all of its lives.

    Attributes:
        up: whether it takes work.
        pid: of its process, while it is up; sequences: in its care now.
        moved: sequences that went on elsewhere, because it was lost or drained.
        moved_bytes: of adapters that it copied to its device.
    """

    number: int
    up: bool
    pid: int | None
    sequences: int
    restarts: int
    moved: int
    moved_bytes: float


class ReplicaCollector(Collector):
    """One family a number; the other metrics of a server are sums over its replicas."""

    def __init__(self, stats: Callable[[], Sequence[ReplicaStats]]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for kind, name, text, values in (
            (GaugeMetricFamily, "up", "1 while it takes work.", [one.up for one in stats]),
            (GaugeMetricFamily, "sequences", "Sequences in its care.", [one.sequences for one in stats]),
            (CounterMetricFamily, "restarts", "Times it was started again.", [one.restarts for one in stats]),
            (
                CounterMetricFamily,
                "moved_sequences",
                "Sequences that went on elsewhere, because it was lost or drained.",
                [one.moved for one in stats],
            ),
            (
                CounterMetricFamily,
                "moved_bytes",
                "Adapter bytes that it copied to its device.",
                [one.moved_bytes for one in stats],
            ),
        ):
            family = kind(f"loramux_replica_{name}", text, labels=("replica",))
            for one, value in zip(stats, values, strict=True):
                family.add_metric((str(one.number),), float(value))
            yield family
