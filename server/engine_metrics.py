"""Metrics of the engine and the residency, which keep the numbers themselves; read when scraped."""

from collections.abc import Callable, Iterable
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from loramux.server.engine.protocol import EngineStats


class ResidencyNumbers(Protocol):
    """What is read of the residency's statistics."""

    @property
    def capacity_bytes(self) -> int: ...
    @property
    def used_bytes(self) -> int: ...
    @property
    def pinned_bytes(self) -> int: ...
    @property
    def host_bytes(self) -> int: ...
    @property
    def blends(self) -> int: ...
    @property
    def hits(self) -> int: ...
    @property
    def misses(self) -> int: ...
    @property
    def evictions(self) -> int: ...
    @property
    def moved_bytes(self) -> int: ...


class EngineCollector(Collector):
    """One call of `stats` a scrape; the numbers that vLLM has too bear its names as well."""

    def __init__(self, base: str, stats: Callable[[], EngineStats]) -> None:
        self._base = base
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        engine = self._stats()
        for name, theirs, text, value in (
            ("sequences_running", "num_requests_running", "Sequences in the engine.", engine.running),
            ("sequences_waiting", "num_requests_waiting", "Sequences queued.", engine.waiting),
            ("kv_usage_ratio", "kv_cache_usage_perc", "Used share of the key-value cache.", engine.kv_usage),
        ):
            yield GaugeMetricFamily(f"loramux_{name}", text, value=value)
            yield self._theirs(GaugeMetricFamily, theirs, text, value)
        tokens = engine.kv_pages * engine.kv_page_tokens
        yield GaugeMetricFamily("loramux_kv_tokens", "Tokens that the key-value cache holds.", value=tokens)
        for name, text, total in (
            ("engine_steps", "Steps of the engine.", engine.steps),
            ("engine_step_seconds", "Seconds spent in steps.", engine.step_seconds),
            ("engine_prefill_tokens", "Prompt tokens computed.", engine.prefill_tokens),
            ("engine_decode_tokens", "Tokens decoded.", engine.decode_tokens),
            ("engine_preemptions", "Sequences that gave their cache back.", engine.preemptions),
            ("prefix_hit_tokens", "Prompt tokens found in the cache.", engine.prefix_hit_tokens),
        ):
            yield CounterMetricFamily(f"loramux_{name}", text, value=total)
        for name, text, total in (
            ("num_preemptions", "Sequences that gave their cache back.", engine.preemptions),
            ("prefix_cache_hits", "Prompt tokens found in the cache.", engine.prefix_hit_tokens),
            (
                "prefix_cache_queries",
                "Prompt tokens looked up in the cache.",
                engine.prefix_hit_tokens + engine.prefill_tokens,
            ),
        ):
            yield self._theirs(CounterMetricFamily, name, text, total)
        pages = GaugeMetricFamily(
            "vllm:cache_config_info",
            "The key-value cache: tokens a page, and pages.",
            labels=("model_name", "block_size", "num_gpu_blocks"),
        )
        pages.add_metric((self._base, str(engine.kv_page_tokens), str(engine.kv_pages)), 1)
        yield pages

    def _theirs(
        self, kind: type[GaugeMetricFamily] | type[CounterMetricFamily], name: str, text: str, value: float
    ) -> Metric:
        family = kind(f"vllm:{name}", text, labels=("model_name",))
        family.add_metric((self._base,), value)
        return family


class ResidencyCollector(Collector):
    """Adapter memory and the cache of blends."""

    def __init__(self, stats: Callable[[], ResidencyNumbers]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        tiers = GaugeMetricFamily("loramux_residency_bytes", "Adapter bytes by tier.", labels=("tier",))
        for tier, value in (
            ("capacity", stats.capacity_bytes),
            ("used", stats.used_bytes),
            ("pinned", stats.pinned_bytes),
            ("host", stats.host_bytes),
        ):
            tiers.add_metric((tier,), value)
        yield tiers
        yield GaugeMetricFamily("loramux_resident_blends", "Blends ready to use.", value=stats.blends)
        for name, text, total in (
            ("hits", "Leases of a resident blend.", stats.hits),
            ("misses", "Leases that had to merge.", stats.misses),
            ("evictions", "Residents thrown out for others.", stats.evictions),
        ):
            yield CounterMetricFamily(f"loramux_merge_cache_{name}", text, value=total)
        yield CounterMetricFamily(
            "loramux_residency_moved_bytes", "Adapter bytes copied to the device.", value=stats.moved_bytes
        )
