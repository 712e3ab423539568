"""Prometheus metrics in a registry of their own: `loramux_*`, and the vLLM names that dashboards read.

Counters and histograms are written as requests end; gauges of the engine and the residency are read at the
scrape. Every label is bounded: by the pool, by the routes, or by `MAX_LABELS`.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from loramux.adapters.sparse.shelf import SparseStats
from loramux.server.engine.protocol import EngineStats
from loramux.server.job import Job, State
from loramux.server.sparse_metrics import SparseCollector

MAX_LABELS = 256
OTHER = "other"

LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
SHORT = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)
NATS = (0.01, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 4.0)
SHARE = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


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


class Metrics:
    """All metrics of one server."""

    def __init__(
        self,
        base: str,
        engine_stats: Callable[[], EngineStats],
        residency_stats: Callable[[], ResidencyNumbers],
        *,
        max_blends: int,
        sparse_stats: Callable[[], SparseStats] = SparseStats,
        arrow_bytes: Callable[[], int] = int,
    ) -> None:
        self.registry = CollectorRegistry()
        self._base = base
        self._labels: dict[str, set[str]] = {}
        self.live: dict[str, Job] = {}
        self._make_latency()
        self._make_routing()
        self._make_http()
        self.registry.register(_Snapshot(base, engine_stats, residency_stats, self.live, max_blends))
        self.registry.register(SparseCollector(sparse_stats, arrow_bytes))

    def _make_latency(self) -> None:
        own = self.registry
        vllm: dict[str, Any] = {"labelnames": ("model_name",), "registry": own}
        self._pairs = {
            name: (
                Histogram(f"loramux_{ours}_seconds", text, registry=own, buckets=LATENCY),
                Histogram(f"vllm:{theirs}_seconds", text, buckets=LATENCY, **vllm).labels(self._base),
            )
            for name, ours, theirs, text in (
                (
                    "ttft",
                    "time_to_first_token",
                    "time_to_first_token",
                    "From the request to its first token.",
                ),
                ("itl", "inter_token", "inter_token_latency", "Between two tokens of one sequence."),
                ("e2e", "request_duration", "e2e_request_latency", "From the request to its end."),
                ("queue", "queue", "request_queue_time", "Waiting for the engine to begin."),
                (
                    "prefill",
                    "prefill",
                    "request_prefill_time",
                    "From the engine's beginning to the first token.",
                ),
                ("decode", "decode", "request_decode_time", "From the first token to the end."),
            )
        }
        counted = {
            name: (
                Counter(f"loramux_{name}", text, registry=own),
                Counter(f"vllm:{name}", text, **vllm).labels(self._base),
            )
            for name, text in (
                ("prompt_tokens", "Tokens of prompts."),
                ("generation_tokens", "Tokens generated."),
            )
        }
        self._prompt_tokens, self._generation_tokens = counted["prompt_tokens"], counted["generation_tokens"]
        self._requests = Counter(
            "loramux_requests", "Requests by how they ended.", ("outcome",), registry=own
        )
        self._success = Counter(
            "vllm:request_success", "Choices by why they ended.", ("model_name", "finished_reason"),
            registry=own,
        )  # fmt: skip
        self._sizes = tuple(
            Histogram(f"vllm:request_{name}_tokens", text, buckets=TOKENS, **vllm).labels(self._base)
            for name, text in (
                ("prompt", "Prompt tokens a request."),
                ("generation", "Generated tokens a request."),
            )
        )

    def _make_routing(self) -> None:
        own = self.registry
        self._route_seconds = Histogram(
            "loramux_route_seconds",
            "A batch of routing texts, by stage.",
            ("stage",),
            buckets=SHORT,
            registry=own,
        )
        self._decisions = Counter(
            "loramux_route_decisions", "Requests by how their blend was chosen.", ("outcome",), registry=own
        )
        self._margin = Histogram(
            "loramux_route_margin", "Best score less the second best.", buckets=SHARE, registry=own
        )
        self._entropy = Histogram(
            "loramux_route_entropy_nats",
            "Of the softmax over every expert's score.",
            buckets=NATS,
            registry=own,
        )
        self._truncated = Counter(
            "loramux_route_truncated", "Routing texts longer than the encoder reads.", registry=own
        )
        self._selected = Counter(
            "loramux_expert_selected", "Requests whose blend holds the expert.", ("expert",), registry=own
        )
        self._routable = Gauge("loramux_routable_experts", "Experts that can be routed to now.", registry=own)
        self._merge_seconds = Histogram(
            "loramux_merge_seconds",
            "Merging a blend that was not resident.",
            ("method",),
            buckets=SHORT,
            registry=own,
        )
        self._merge_error = Histogram(
            "loramux_merge_relative_error", "Of merged blends, against the exact sum.", ("method",),
            buckets=SHARE, registry=own,
        )  # fmt: skip

    def _make_http(self) -> None:
        labels = ("method", "route", "status")
        self._http = Counter("loramux_http_requests", "HTTP answers.", labels, registry=self.registry)
        self._http_seconds = Histogram(
            "loramux_http_request_duration_seconds", "HTTP answers, to their last byte.", ("route",),
            buckets=LATENCY, registry=self.registry,
        )  # fmt: skip

    def count_routable(self, count: Callable[[], int]) -> None:
        """How many experts can be routed to, asked at every scrape."""
        self._routable.set_function(count)

    def received(self, job: Job) -> None:
        """A job began."""
        self.live[job.id] = job

    def token_gap(self, seconds: float) -> None:
        """Seconds between two tokens of a sequence."""
        for histogram in self._pairs["itl"]:
            histogram.observe(seconds)

    def closed(self, job: Job) -> None:
        """A job ended: its latencies are differences of its stamps."""
        self.live.pop(job.id, None)
        self._requests.labels(str(job.state)).inc()
        for amount, counters in (
            (job.prompt_tokens, self._prompt_tokens),
            (job.completion_tokens, self._generation_tokens),
        ):
            for counter in counters:
                counter.inc(amount)
        spans = {
            "ttft": (State.RECEIVED, State.DECODE),
            "queue": (State.WAITING, State.PREFILL),
            "prefill": (State.PREFILL, State.DECODE),
            "decode": (State.DECODE, State.FINISHED),
            "e2e": (State.RECEIVED, State.FINISHED),
        }
        for name, (start, end) in spans.items():
            seconds = job.seconds(start, end)
            if seconds is not None:
                for histogram in self._pairs[name]:
                    histogram.observe(seconds)
        if job.state is State.FINISHED:
            for histogram, tokens in zip(
                self._sizes, (job.prompt_tokens, job.completion_tokens), strict=True
            ):
                histogram.observe(tokens)
            for reason in job.finish_reasons:
                self._success.labels(self._base, reason).inc()

    def routed(
        self,
        outcome: str,
        experts: Iterable[str],
        *,
        margin: float | None = None,
        entropy: float | None = None,
        truncated: bool = False,
    ) -> None:
        """A blend was chosen: `outcome` is routed, fallback, named, given or arrow."""
        self._decisions.labels(outcome).inc()
        for expert in experts:
            self._selected.labels(self._bounded("expert", expert)).inc()
        if margin is not None:
            self._margin.observe(margin)
        if entropy is not None:
            self._entropy.observe(entropy)
        if truncated:
            self._truncated.inc()

    def route_stage(self, stage: str, seconds: float) -> None:
        """A batch of texts went through one stage of the router."""
        self._route_seconds.labels(stage).observe(seconds)

    def merged(self, method: str, seconds: float, relative_error: float) -> None:
        """A blend was made resident."""
        self._merge_seconds.labels(method).observe(seconds)
        self._merge_error.labels(method).observe(relative_error)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """An HTTP answer went out; `route` is the template, never the path."""
        known = method if method in {"GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"} else OTHER
        self._http.labels(known, route, str(status)).inc()
        self._http_seconds.labels(route).observe(seconds)

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)

    def _bounded(self, label: str, value: str) -> str:
        seen = self._labels.setdefault(label, set())
        if value in seen or len(seen) < MAX_LABELS:
            seen.add(value)
            return value
        return OTHER


class _Snapshot(Collector):
    """Gauges and counters that others keep, read when scraped."""

    def __init__(
        self,
        base: str,
        engine_stats: Callable[[], EngineStats],
        residency_stats: Callable[[], ResidencyNumbers],
        live: dict[str, Job],
        max_blends: int,
    ) -> None:
        self._base = base
        self._engine_stats = engine_stats
        self._residency_stats = residency_stats
        self._live = live
        self._max_blends = max_blends

    def collect(self) -> Iterable[Metric]:
        engine = self._engine_stats()
        for name, theirs, text, value in (
            ("sequences_running", "num_requests_running", "Sequences in the engine.", engine.running),
            ("sequences_waiting", "num_requests_waiting", "Sequences queued.", engine.waiting),
            (
                "kv_usage_ratio",
                "kv_cache_usage_perc",
                "Share of the key-value cache in use.",
                engine.kv_usage,
            ),
        ):
            yield GaugeMetricFamily(f"loramux_{name}", text, value=value)
            aliased = GaugeMetricFamily(f"vllm:{theirs}", text, labels=("model_name",))
            aliased.add_metric((self._base,), value)
            yield aliased
        for name, text, total in (
            ("engine_steps", "Steps of the engine.", engine.steps),
            ("engine_step_seconds", "Seconds spent in steps.", engine.step_seconds),
            ("engine_prefill_tokens", "Prompt tokens computed.", engine.prefill_tokens),
            ("engine_decode_tokens", "Tokens decoded.", engine.decode_tokens),
            ("prefix_hit_tokens", "Prompt tokens found in the cache.", engine.prefix_hit_tokens),
        ):
            yield CounterMetricFamily(f"loramux_{name}", text, value=total)
        yield from self._residency()
        yield self._lora_info()

    def _residency(self) -> Iterable[Metric]:
        stats = self._residency_stats()
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

    def _lora_info(self) -> Metric:
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
        info.add_metric(
            (str(self._max_blends), ",".join(sorted(running)), ",".join(sorted(waiting))), time.time()
        )
        return info
