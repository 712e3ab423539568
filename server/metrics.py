"""Prometheus metrics in a registry of their own: `loramux_*`, and the vLLM names that dashboards read.

Counters and histograms are written as requests end; gauges of the engine and the residency are read at the
scrape. Every label is bounded: by the pool, by the routes, or by `MAX_LABELS`.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)

from loramux.adapters.sparse.shelf import SparseStats
from loramux.server.engine.protocol import EngineStats
from loramux.server.engine_metrics import EngineCollector, ResidencyCollector, ResidencyNumbers
from loramux.server.expert_metrics import ExpertCollector, ExpertStats
from loramux.server.job import Job, State
from loramux.server.replica_metrics import ReplicaCollector, ReplicaStats
from loramux.server.sparse_metrics import SparseCollector

MAX_LABELS = 256
OTHER = "other"

LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
SHORT = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
RANKS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)
NATS = (0.01, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 4.0)
SHARE = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Metrics:
    """All metrics of one server."""

    def __init__(
        self,
        base: str,
        engine_stats: Callable[[], EngineStats],
        residency_stats: Callable[[], ResidencyNumbers],
        *,
        sparse_stats: Callable[[], SparseStats] = SparseStats,
        token_bytes: Callable[[], Mapping[str, int]] = dict,
        replicas: Callable[[], Sequence[ReplicaStats]] = tuple,
    ) -> None:
        self.registry = CollectorRegistry()
        self._base = base
        self._labels: dict[str, set[str]] = {}
        self.live: dict[str, Job] = {}
        self._make_latency()
        self._make_routing()
        self._make_http()
        self._make_process()
        self._expert_stats: Callable[[], ExpertStats] = ExpertStats
        for collector in (
            EngineCollector(base, engine_stats),
            ResidencyCollector(residency_stats),
            ExpertCollector(base, self._experts, self.live),
            SparseCollector(sparse_stats, token_bytes),
            ReplicaCollector(replicas),
        ):
            self.registry.register(collector)

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
                (
                    "inference",
                    "inference",
                    "request_inference_time",
                    "From the engine's beginning to the end.",
                ),
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
        self._nearest = Counter(
            "loramux_route_nearest",
            "Routed texts by the expert with the best score, and whether it was good enough.",
            ("expert", "outcome"),
            registry=own,
        )
        self._routable = Gauge("loramux_routable_experts", "Experts that can be routed to now.", registry=own)
        self._audits = Counter(
            "loramux_audits", "Audits of routed answers by how they ended.", ("outcome",), registry=own
        )
        self._audit_tokens = Counter(
            "loramux_audit_tokens",
            "Prompt tokens that audits scored, by best expert.",
            ("expert",),
            registry=own,
        )
        self._audit_losses = Counter(
            "loramux_audit_loss_nats",
            "Summed loss of those tokens under the base, the best expert alone and the blend.",
            ("expert", "mixture"),
            registry=own,
        )
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

        self._merge_rank = Histogram(
            "loramux_merge_rank", "Of merged blends.", ("method",), buckets=RANKS, registry=own
        )

    def _make_process(self) -> None:
        own = self.registry
        Info("loramux_build", "The server's version and its base.", registry=own).info(
            {"version": version("loramux"), "base": self._base}
        )
        self._ready = Gauge("loramux_ready", "1 while requests are taken.", registry=own)
        self._loads = Counter(
            "loramux_adapter_loads", "Adapters loaded while serving.", ("outcome",), registry=own
        )
        self._load_seconds = Histogram(
            "loramux_adapter_load_seconds", "Reading, checking and serving an adapter.", registry=own,
            buckets=LATENCY,
        )  # fmt: skip
        ProcessCollector(registry=own)

    def _make_http(self) -> None:
        labels = ("method", "route", "status")
        self._http = Counter("loramux_http_requests", "HTTP answers.", labels, registry=self.registry)
        self._http_seconds = Histogram(
            "loramux_http_request_duration_seconds", "HTTP answers, to their last byte.", ("route",),
            buckets=LATENCY, registry=self.registry,
        )  # fmt: skip

    def watch(
        self, *, routable: Callable[[], int], ready: Callable[[], bool], experts: Callable[[], ExpertStats]
    ) -> None:
        """What is asked at every scrape: how many experts can be routed to, whether requests are taken, and
        where the experts are."""
        self._routable.set_function(routable)
        self._ready.set_function(ready)
        self._expert_stats = experts

    @contextmanager
    def adapter_load(self) -> Iterator[None]:
        """Around the load of an adapter; one that raises was refused."""
        started = time.monotonic()
        try:
            yield
        except Exception:
            self._loads.labels("refused").inc()
            raise
        self._loads.labels("loaded").inc()
        self._load_seconds.observe(time.monotonic() - started)

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
            "inference": (State.PREFILL, State.FINISHED),
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
        nearest: str | None = None,
        margin: float | None = None,
        entropy: float | None = None,
        truncated: bool = False,
    ) -> None:
        """A blend was chosen: `outcome` is routed, fallback, named, given, arrow or, for a router that
        failed, error. `nearest` is the expert with the best score, good enough or not."""
        self._decisions.labels(outcome).inc()
        for expert in experts:
            self._selected.labels(self._bounded("expert", expert)).inc()
        if nearest is not None:
            self._nearest.labels(self._bounded("expert", nearest), outcome).inc()
        if margin is not None:
            self._margin.observe(margin)
        if entropy is not None:
            self._entropy.observe(entropy)
        if truncated:
            self._truncated.inc()

    def audited(
        self,
        outcome: str,
        expert: str | None = None,
        tokens: int = 0,
        losses: Mapping[str, float] | None = None,
    ) -> None:
        """An audit ended: `outcome` is measured, dropped or failed; `losses` are sums over `tokens` by
        mixture, and `expert` is the best one, which stands for the domain."""
        self._audits.labels(outcome).inc()
        if expert is None or losses is None:
            return
        domain = self._bounded("expert", expert)
        self._audit_tokens.labels(domain).inc(tokens)
        for mixture, nats in losses.items():
            self._audit_losses.labels(domain, mixture).inc(nats)

    def route_stage(self, stage: str, seconds: float) -> None:
        """A batch of texts went through one stage of the router."""
        self._route_seconds.labels(stage).observe(seconds)

    def merged(self, method: str, seconds: float, relative_error: float, rank: int) -> None:
        """A blend was made resident."""
        self._merge_rank.labels(method).observe(rank)
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

    def _experts(self) -> ExpertStats:
        return self._expert_stats()

    def _bounded(self, label: str, value: str) -> str:
        seen = self._labels.setdefault(label, set())
        if value in seen or len(seen) < MAX_LABELS:
            seen.add(value)
            return value
        return OTHER
