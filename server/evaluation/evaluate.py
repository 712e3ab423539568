"""Measuring a pool: its router over a test set, and through the serving engine what its mixtures answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from loramux.router.router import Router
from loramux.server.evaluation.items import AnswerItem, Item, read_items
from loramux.server.evaluation.ledger import Ledger
from loramux.server.evaluation.result import Evaluation
from loramux.server.evaluation.routing import RoutingTable, expert_domains, routing_tables
from loramux.server.evaluation.score import DomainScore
from loramux.server.evaluation.systems import System
from loramux.server.pool.routing import load_pool_router, open_pool
from loramux.server.settings import Settings

#: Called with what is being done, how much of it is done, and how much there is (0: not known).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured.

    data: files and folders of items. foreign: the same, of texts that no expert is for. limit: items of each
    domain. only: systems (see `systems_of`). top_m: widths of the routed blends. max_tokens: longer items are
    cut. max_new: rows with answers of more tokens are asked for no exact match. seed: of what is drawn.
    routing_only: do not load the base. ledger: where scores are kept as they come.
    """

    data: tuple[Path, ...]
    foreign: tuple[Path, ...] = ()
    limit: int | None = 50
    only: tuple[str, ...] = ()
    top_m: tuple[int, ...] = (1, 3)
    max_tokens: int = 1024
    max_new: int = 48
    seed: int = 0
    routing_only: bool = False
    ledger: Path | None = None


def evaluate(settings: Settings, options: Options, progress: Progress = lambda *_: None) -> Evaluation:
    """Measure the pool of the settings.

    Raises:
        StartError, RowError, RouterError, AdapterError: what is wrong with the pool or the data.
    """
    items = read_items(options.data, limit=options.limit, seed=options.seed)
    foreign: dict[str, list[Item]] = {}
    if options.foreign:
        foreign = read_items(options.foreign, limit=options.limit, seed=options.seed)
    pool = open_pool(settings)
    progress("routing", 0, 0)
    domains, routing = _routed(load_pool_router(settings, pool), items, foreign)
    systems: list[System] = []
    scores: Mapping[str, Mapping[str, DomainScore]] = {}
    about = {
        "items": {domain: len(found) for domain, found in items.items()},
        "foreign": {domain: len(found) for domain, found in foreign.items()},
        "seed": options.seed,
        "limit": options.limit,
        "max_tokens": options.max_tokens,
        "max_new": options.max_new,
        "dtype": settings.dtype,
        "quantization": settings.quantization,
    }
    if not options.routing_only:
        systems, scores = asyncio.run(_answered(settings, options, items, progress))
    return Evaluation(pool.manifest.name, domains, routing, systems, scores, about)


def _routed(
    router: Router, items: Mapping[str, Sequence[Item]], foreign: Mapping[str, Sequence[Item]]
) -> tuple[dict[str, str], dict[str, RoutingTable]]:
    texts = {domain: [item.text for item in found] for domain, found in items.items()}
    # Questions with choices are for measuring alone: experts are not named after them.
    named = {
        domain: [item.text for item in found if isinstance(item, AnswerItem)]
        for domain, found in items.items()
    }
    domains = expert_domains(router, {domain: found for domain, found in named.items() if found} or texts)
    others = [item.text for found in foreign.values() for item in found]
    return domains, routing_tables(router, texts, domains, others)


async def _answered(
    settings: Settings, options: Options, items: Mapping[str, Sequence[Item]], progress: Progress
) -> tuple[list[System], Mapping[str, Mapping[str, DomainScore]]]:
    from loramux.server.assemble import assemble
    from loramux.server.build import base_files, load_tokenizer
    from loramux.server.evaluation.measuring import Measuring
    from loramux.server.evaluation.systems import systems_of

    progress("loading the base", 0, 0)
    parts = assemble(settings)
    systems = systems_of(parts.catalog, options.top_m, options.only, inside=not settings.backend.urls)
    tokenizer = load_tokenizer(base_files(settings, open_pool(settings)).folder, settings.chat_template)
    measuring = Measuring(parts, tokenizer, max_tokens=options.max_tokens, max_new=options.max_new)
    numbers = (settings.base, settings.device, settings.dtype, settings.quantization)
    described = f"{parts.fingerprint} {numbers} {options.max_tokens} {options.max_new}"
    everything = [item for found in items.values() for item in found]
    await parts.engine.start()
    try:
        with Ledger(options.ledger, sha256(described.encode()).hexdigest()) as ledger:
            found = await measuring.run(
                systems, everything, ledger, lambda done, whole: progress("answers", done, whole)
            )
    finally:
        await parts.engine.stop(5.0)
        await parts.router.close()
    scores = {
        system.name: {
            domain: DomainScore.of(asked, [found[system.name, item.id] for item in asked])
            for domain, asked in items.items()
        }
        for system in systems
    }
    return systems, scores
