"""The parts of a server, as `build.py` makes them and the app receives them."""

from dataclasses import dataclass

from loramux.adapters.sparse.shelf import Shelf
from loramux.server.admin import AdapterAdmin
from loramux.server.catalog import Catalog
from loramux.server.engine.protocol import Engine
from loramux.server.intake import Intake
from loramux.server.leases import Leases, Residence
from loramux.server.lifecycle import Lifecycle
from loramux.server.metrics import Metrics
from loramux.server.pipeline import Pipeline
from loramux.server.selection import Router, Selector
from loramux.server.settings import Settings
from loramux.server.text.prompts import Prompts
from loramux.server.text.vocabulary import Vocabulary
from loramux.server.traces import Traces


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that the routes use. `fingerprint` names the pool whose weights answer."""

    settings: Settings
    api_keys: tuple[str, ...]
    lifecycle: Lifecycle
    catalog: Catalog
    prompts: Prompts
    vocabulary: Vocabulary
    intake: Intake
    router: Router
    selector: Selector
    residency: Residence
    shelf: Shelf
    leases: Leases
    engine: Engine
    pipeline: Pipeline
    metrics: Metrics
    traces: Traces
    admin: AdapterAdmin
    fingerprint: str
