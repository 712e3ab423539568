"""The parts of an edge: those of `server/build.py`, around replicas in place of an engine of its own."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from loramux.router.service import RoutingService
from loramux.server.build import base_files, fingerprint, load_tokenizer
from loramux.server.connect import connect
from loramux.server.engine.grammars import Grammars
from loramux.server.lifecycle import Phase
from loramux.server.metrics import Metrics
from loramux.server.parts import Parts
from loramux.server.pool.facts import read_facts
from loramux.server.pool.routing import load_pool_router, open_pool
from loramux.server.replicas.engine import FleetEngine
from loramux.server.replicas.fleet import Fleet
from loramux.server.replicas.frames import Message
from loramux.server.replicas.hearing import FleetHearing
from loramux.server.replicas.life import Life
from loramux.server.replicas.placement import Affinity
from loramux.server.replicas.process import Process
from loramux.server.replicas.stores import (
    FleetAdmin,
    FleetExperts,
    FleetShelf,
    FleetTokens,
    read_nothing,
)
from loramux.server.settings import Settings, api_keys
from loramux.server.traces import make_traces


def build_edge(
    settings: Settings,
    *,
    affinity: Affinity | None = None,
    launch: Callable[..., Life] = Process.launch,
) -> Parts:
    """Start `settings.replicas` processes, or what `launch` starts in their place, and connect everything to
    them when all are ready.

    Raises:
        StartError, AdapterError, RouterError: one line that names the file, setting or replica at fault;
            none runs then.
    """
    keys = api_keys(settings)
    traces = make_traces(settings.traces)
    pool = open_pool(settings)
    # The edge has compared every file with its hash; a replica that is started later is compared with the
    # first ones.
    theirs = settings.model_copy(update={"verify_pool": False})
    with ExitStack() as undo:
        first = _start(theirs, launch, undo)
        hello = first[0][1]
        tokenizer = load_tokenizer(base_files(settings, pool).folder, settings.chat_template)
        fleet = Fleet(theirs, first, affinity=affinity, launch=launch)
        experts, shelf, mixtures = FleetExperts(fleet), FleetShelf(fleet), FleetTokens(fleet)
        base = pool.manifest.base.id
        engine = FleetEngine(fleet)
        metrics = Metrics(
            base,
            engine.stats,
            experts.stats,
            sparse_stats=shelf.stats,
            token_bytes=fleet.totals.token_bytes,
            replicas=fleet.stats,
        )
        parts = connect(
            settings,
            metrics=metrics,
            keys=keys,
            base=base,
            residency=experts,
            shelf=shelf,
            mixtures=mixtures,
            engine=engine,
            router=RoutingService(load_pool_router(settings, pool), observe=metrics.route_stage),
            tokenizer=tokenizer,
            grammars=Grammars(tokenizer, hello["eos_ids"], hello["width"]),
            read=read_nothing,
            adapter_root=settings.adapter_root or pool.root / "experts",
            admin=partial(FleetAdmin, fleet),
            hearing=FleetHearing(fleet),
            fingerprint=fingerprint(pool),
            traces=traces,
            sampling=pool.manifest.sampling,
            facts=read_facts(pool),
        )
        undo.pop_all()
    fleet.draining = lambda: parts.lifecycle.phase is Phase.DRAINING
    return replace(parts, fleet=fleet)


def _start(settings: Settings, launch: Callable[..., Life], undo: ExitStack) -> list[tuple[Life, Message]]:
    """All processes at once, and what they say."""
    count = settings.replicas
    lives: list[Life] = []
    for number in range(count):
        life = launch(settings, number, replicas=count, among=count)
        undo.callback(life.end)
        lives.append(life)
    return [(life, life.hello()) for life in lives]
