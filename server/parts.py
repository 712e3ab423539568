"""The parts of a server, as `connect.py` makes them and the app receives them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from loramux.server.admin import AdapterAdmin
from loramux.server.catalog import Catalog
from loramux.server.engine.protocol import Engine
from loramux.server.intake import Intake
from loramux.server.leases import ExpertStore, Leases, SparseStore
from loramux.server.lifecycle import Lifecycle
from loramux.server.metrics import Metrics
from loramux.server.pipeline import Pipeline
from loramux.server.replica_metrics import ReplicaStats
from loramux.server.sampling_settings import SamplingSettings
from loramux.server.selection import Router, Selector
from loramux.server.settings import Settings
from loramux.server.text.prompts import Prompts
from loramux.server.text.vocabulary import Vocabulary
from loramux.server.traces import Traces


class Replicas(Protocol):
    """What is asked of the processes that generate."""

    def stats(self) -> Sequence[ReplicaStats]:
        """Of each, by its number."""
        ...

    async def drain(self, number: int) -> bool:
        """Move its work to others and start it again; False where that cannot be."""
        ...


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that the routes use. `sampling` is what requests get that leave it out, `fingerprint` names
    the pool whose weights answer, and `fleet` what generates where that is done in other processes."""

    settings: Settings
    sampling: SamplingSettings
    api_keys: tuple[str, ...]
    lifecycle: Lifecycle
    catalog: Catalog
    prompts: Prompts
    vocabulary: Vocabulary
    intake: Intake
    router: Router
    selector: Selector
    residency: ExpertStore
    shelf: SparseStore
    leases: Leases
    engine: Engine
    pipeline: Pipeline
    metrics: Metrics
    traces: Traces
    admin: AdapterAdmin
    fingerprint: str
    fleet: Replicas | None = None
