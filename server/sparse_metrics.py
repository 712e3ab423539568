"""Metrics of the sparse models, read when scraped; a model has them while it is loaded."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from loramux.adapters.sparse.shelf import SparseStats

#: Over this many experts, the rest of a model's are counted together.
MAX_EXPERTS = 64
OTHER = "other"


class SparseCollector(Collector):
    """`shelf` gives the statistics of the loaded models, `token_bytes` what arrow and spectr keep ready."""

    def __init__(
        self, shelf: Callable[[], SparseStats], token_bytes: Callable[[], Mapping[str, int]]
    ) -> None:
        self._shelf = shelf
        self._token_bytes = token_bytes

    def collect(self) -> Iterable[Metric]:
        stats = self._shelf()
        sizes = GaugeMetricFamily(
            "loramux_sparse_bytes", "Device bytes of sparse models, of arrow and of spectr.", labels=("what",)
        )
        sizes.add_metric(("models",), stats.nbytes)
        for method, nbytes in self._token_bytes().items():
            sizes.add_metric((method,), nbytes)
        tokens = CounterMetricFamily(
            "loramux_sparse_expert_tokens",
            "Tokens that went to an expert, over the counted routers.",
            labels=("model", "expert"),
        )
        entropy = GaugeMetricFamily(
            "loramux_sparse_router_entropy_nats", "Of a decision, mean.", labels=("model",)
        )
        for model, load in stats.loads.items():
            for expert, amount in enumerate(load.tokens[:MAX_EXPERTS]):
                tokens.add_metric((model, str(expert)), amount)
            if len(load.tokens) > MAX_EXPERTS:
                tokens.add_metric((model, OTHER), sum(load.tokens[MAX_EXPERTS:]))
            entropy.add_metric((model,), load.mean_entropy)
        return (sizes, tokens, entropy)
