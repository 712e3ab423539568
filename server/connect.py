"""The parts of a server around a residency, an engine and a router, whichever they are."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

from loramux.adapters.lora import LoraAdapter
from loramux.adapters.sparse.model import SparseModel
from loramux.adapters.sparse.options import ReadOptions
from loramux.server.admin import AdapterAdmin
from loramux.server.audit import Audits
from loramux.server.catalog import Catalog
from loramux.server.counterfactuals import Counterfactuals
from loramux.server.engine.grammars import Grammars
from loramux.server.engine.protocol import Engine
from loramux.server.expert_metrics import expert_stats
from loramux.server.intake import Intake
from loramux.server.leases import ExpertStore, Leases, SparseStore, TokenStore
from loramux.server.lifecycle import Lifecycle, Phase
from loramux.server.logo import Hearing, LocalHearing, Logo
from loramux.server.metrics import Metrics
from loramux.server.parts import Parts
from loramux.server.pipeline import Pipeline
from loramux.server.pool.facts import ExpertFacts
from loramux.server.selection import Router, Selector
from loramux.server.settings import Settings
from loramux.server.text.prompts import ChatTokenizer, Prompts
from loramux.server.text.vocabulary import Vocabulary
from loramux.server.toolkit import Toolkit
from loramux.server.traces import NO_TRACES, Traces


def connect(
    settings: Settings,
    *,
    metrics: Metrics,
    keys: tuple[str, ...],
    base: str,
    residency: ExpertStore,
    shelf: SparseStore,
    mixtures: TokenStore,
    engine: Engine,
    router: Router,
    tokenizer: ChatTokenizer,
    grammars: Grammars,
    read: Callable[[Path, str, ReadOptions], LoraAdapter | SparseModel],
    adapter_root: Path,
    fingerprint: str,
    traces: Traces = NO_TRACES,
    sampling: Mapping[str, int | float] = MappingProxyType({}),
    facts: Mapping[str, ExpertFacts] = MappingProxyType({}),
    refused: Mapping[str, str] = MappingProxyType({}),
    admin: Callable[..., AdapterAdmin] = AdapterAdmin,
    hearing: Hearing | None = None,
) -> Parts:
    """The parts of a server around a residency, an engine and a router, whichever they are.

    `sampling`: the pool's defaults of requests; `facts`: what the pool says of its experts, by id; `refused`:
    why some names of the pool are not served. `admin` is an `AdapterAdmin`, and `hearing` a `LocalHearing`,
    or what does the same in other processes.
    """
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    catalog = Catalog(base, residency.experts, engine.max_context, router, shelf.cards, facts, refused)
    prompts = Prompts(tokenizer, vocabulary, engine.max_context)
    lifecycle = Lifecycle()
    gains = {
        residency.experts[name].content_hash: fact.measured.gain
        for name, fact in facts.items()
        if name in residency.experts and fact.measured.gain is not None
    }
    metrics.watch(
        routable=lambda: len(catalog.routed()),
        ready=lambda: lifecycle.phase is Phase.READY and engine.stats().is_live,
        experts=lambda: expert_stats(residency, shelf, gains),
    )
    selector = Selector(
        catalog=catalog,
        router=router,
        defaults=settings.routing,
        logo=Logo(hearing or LocalHearing(engine), partial(metrics.route_stage, "probe")),
        weight_step=settings.residency.weight_step,
        metrics=metrics,
    )
    leases = Leases(residency, shelf, mixtures)
    counterfactuals = Counterfactuals(engine, leases, selector)
    audits = Audits(
        counterfactuals,
        share=settings.routing.audit_share,
        stats=engine.stats,
        metrics=metrics,
        lifecycle=lifecycle,
    )
    pipeline = Pipeline(
        selector=selector,
        leases=leases,
        engine=engine,
        vocabulary=vocabulary,
        metrics=metrics,
        lifecycle=lifecycle,
        counterfactuals=counterfactuals,
        audits=audits,
        traces=traces,
    )
    return Parts(
        settings=settings,
        sampling=settings.sampling.over(sampling),
        api_keys=keys,
        lifecycle=lifecycle,
        catalog=catalog,
        prompts=prompts,
        vocabulary=vocabulary,
        intake=Intake(prompts, catalog, grammars, Toolkit(tokenizer, vocabulary, settings.tools.format)),
        router=router,
        selector=selector,
        residency=residency,
        shelf=shelf,
        leases=leases,
        engine=engine,
        pipeline=pipeline,
        metrics=metrics,
        traces=traces,
        admin=admin(catalog, residency, shelf, router, adapter_root, read),
        fingerprint=fingerprint,
    )
