"""The parts of a server in front of backends: everything but the base, which they hold."""

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import BlendError
from loramux.adapters.lora import LoraAdapter, LoraPair
from loramux.adapters.sparse.model import SparseModel
from loramux.adapters.sparse.shelf import Shelf
from loramux.adapters.sparse.slot import SparseSlot
from loramux.adapters.sparse.token_experts import TokenExperts
from loramux.adapters.sparse.token_mixtures import TokenMethod, TokenMixtures
from loramux.router.service import RoutingService
from loramux.server.backend.connection import Connection
from loramux.server.backend.engine import RemoteEngine
from loramux.server.backend.errors import BackendDown, BackendError
from loramux.server.backend.fleet import Fleet
from loramux.server.backend.folders import PREFIX, BlendFolders, Written
from loramux.server.backend.inspection import SAMPLE, ExpectedBase, inspect_adapters, inspect_base
from loramux.server.backend.protocol import AdapterBackend, BackendFacts
from loramux.server.backend.residency import LoadedBlend, RemoteResidency
from loramux.server.backend.room import Room
from loramux.server.backend.vllm import EndTokens, VllmBackend
from loramux.server.base_files import BaseFiles
from loramux.server.build import base_files, fingerprint, load_tokenizer, read_adapter
from loramux.server.connect import connect
from loramux.server.engine.grammars import Grammars
from loramux.server.engine.model import DTYPES
from loramux.server.errors import StartError
from loramux.server.memory.blueprint import Blueprint
from loramux.server.metrics import Metrics
from loramux.server.parts import Parts
from loramux.server.pool.experts import read_experts
from loramux.server.pool.facts import read_facts
from loramux.server.pool.manifest import Pool
from loramux.server.pool.routing import load_pool_router, open_pool
from loramux.server.settings import Settings, api_keys
from loramux.server.text.prompts import ChatTokenizer
from loramux.server.traces import make_traces

log = logging.getLogger("loramux")

WHY_SPARSE = "a sparse model computes in every layer what no backend knows; serve it without --backend"
INSIDE = "that is computed inside the base, which no backend allows; serve it without --backend"


def build_front(settings: Settings) -> Parts:
    """Read the pool, ask the backends what they are, and connect everything.

    Raises:
        StartError, AdapterError, RouterError: one line that names the file, setting or backend at fault.
    """
    chosen = settings.backend
    refuse_strategy(settings.routing.strategy)
    keys = api_keys(settings)
    traces = make_traces(settings.traces)
    pool = open_pool(settings)
    files = base_files(settings, pool)
    blueprint = Blueprint.read(files.folder)
    shapes = blueprint.shapes(pool.manifest.base.id)
    tokenizer = load_tokenizer(files.folder, settings.chat_template)
    ends = end_tokens(files.folder, tokenizer)
    grammars = Grammars(tokenizer, sorted(ends.answer), blueprint.vocabulary)
    dtype = DTYPES.get(settings.dtype)
    experts = read_experts(pool, shapes, dtype)
    folders = BlendFolders(blend_folder(chosen.folder), there=chosen.folder_there)
    expected = expected_base(settings, pool, files, tokenizer)
    fleet = vllm_fleet(settings, expected, ends, probes(folders, experts, shapes, chosen.max_lora_rank))
    try:
        facts = asyncio.run(first_look(fleet))
    except BackendError as error:
        folders.close()
        raise StartError(str(error)) from None
    room = Room.of(chosen)
    residency = RemoteResidency(experts, fleet, folders, room, base=pool.manifest.base.id)
    warn_of_width(experts, settings.routing.top_m, room)
    most = len(fleet.members) * settings.engine.max_running + settings.engine.max_waiting
    context = min(blueprint.positions, *(one.max_context for one in facts))
    engine = RemoteEngine(fleet, LoadedBlend, max_context=context, most=most)
    metrics = Metrics(pool.manifest.base.id, engine.stats, residency.stats)
    router = RoutingService(load_pool_router(settings, pool), observe=metrics.route_stage)
    refused = {entry.id: WHY_SPARSE for entry in pool.manifest.sparse}
    for id in refused:
        log.warning("sparse model %s is not served: %s", id, WHY_SPARSE)
    return connect(
        settings,
        metrics=metrics,
        keys=keys,
        base=pool.manifest.base.id,
        residency=residency,
        shelf=Shelf(refuse_sparse),
        mixtures=TokenMixtures(refuse_tokens),
        engine=engine,
        router=router,
        tokenizer=tokenizer,
        grammars=grammars,
        read=partial(read_adapter, shapes=shapes, dtype=dtype, host_dtype=dtype, pinned=False),
        adapter_root=settings.adapter_root or pool.root / "experts",
        fingerprint=fingerprint(pool),
        traces=traces,
        sampling=pool.manifest.sampling,
        facts=read_facts(pool),
        refused=refused,
    )


def refuse_sparse(model: SparseModel) -> SparseSlot:
    """Raises `BlendError`, which says why."""
    raise BlendError(f"{model.id!r} is {model.kind}: {WHY_SPARSE}")


def refuse_tokens(method: TokenMethod, _experts: Sequence[LoraAdapter]) -> TokenExperts:
    """Raises `BlendError`, which says why."""
    raise BlendError(f"{method} chooses experts token by token: {INSIDE}")


def refuse_strategy(strategy: str) -> None:
    """Raises `StartError` where requests would be routed in a way that no backend can serve."""
    if strategy in (*TokenMethod, "logo"):
        raise StartError(f"routing.strategy {strategy} asks the experts themselves: {INSIDE}")


def vllm_fleet(
    settings: Settings,
    expected: ExpectedBase,
    ends: EndTokens,
    probe_paths: Mapping[str, str],
) -> Fleet[AdapterBackend]:
    """The servers that the settings name, and how each is inspected."""
    chosen = settings.backend
    key = None if chosen.api_key is None else chosen.api_key.get_secret_value()

    async def inspect(server: AdapterBackend) -> BackendFacts:
        facts = await inspect_base(server, expected)
        for name, path in probe_paths.items():
            await inspect_adapters(server, name, path)
        return facts

    servers: list[AdapterBackend] = [
        VllmBackend(Connection(url, key=key, seconds=chosen.silent_seconds), ends) for url in chosen.urls
    ]
    return Fleet(servers, inspect)


async def first_look(fleet: Fleet[AdapterBackend]) -> list[BackendFacts]:
    """Ask every backend what it is, before anything is served.

    Returns:
        What those say that answer: at least one.

    Raises:
        BackendError: one is not what it has to be, or none answers.
    """
    found: list[BackendFacts] = []
    down: list[BackendError] = []
    await fleet.open()
    try:
        for member in fleet.members:
            try:
                facts = await fleet.known(member)
            except BackendDown as error:
                down.append(error)
                continue
            log.info("backend %s: %s %s, base %s", member.url, facts.kind, facts.version, facts.base)
            found.append(facts)
    finally:
        await fleet.close()
    if not found:
        raise fleet.none_left(down)
    return found


def probes(
    folders: BlendFolders, experts: Mapping[str, LoraAdapter], shapes: BaseShapes, rank: int
) -> dict[str, str]:
    """Two adapters that change nothing, by name, where backends find them.

    One touches every module that an expert touches, with rank 1; one has the largest rank on one module. A
    backend that loads both takes every blend.
    """
    modules = sorted({module for expert in experts.values() for module in expert.pairs})
    found = {}
    for name, touched, width in (("0" * 32, modules, 1), ("1" * 32, modules[:1], rank)):
        pairs = {
            module: LoraPair(
                torch.zeros(width, shapes.modules[module][1]),
                torch.zeros(shapes.modules[module][0], width),
                1.0,
            )
            for module in touched
        }
        if pairs:
            folders.erase(PREFIX + name)
            folders.write(
                PREFIX + name, LoraAdapter(name, name, pairs), Written("exact", width, 0.0, 0), shapes.id
            )
            found[PREFIX + name] = folders.path_there(PREFIX + name)
    return found


def expected_base(settings: Settings, pool: Pool, files: BaseFiles, tokenizer: ChatTokenizer) -> ExpectedBase:
    """What the backends have to hold."""
    names = {pool.manifest.base.id, files.folder, settings.base, files.id} - {None}
    return ExpectedBase(
        names=frozenset(str(name) for name in names),
        ours=pool.manifest.base.id,
        folder=Path(files.folder),
        tokens=tuple(tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]),
        trusted=settings.backend.any_base,
    )


def end_tokens(folder: str, tokenizer: ChatTokenizer) -> EndTokens:
    """The tokens that end an answer of the base, as its files say, and a grammar, for which the tokenizer's
    own will do."""
    try:
        config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        config = GenerationConfig.from_model_config(
            AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        )
    eos = config.eos_token_id
    ends = frozenset([eos] if isinstance(eos, int) else eos or ())
    own = tokenizer.eos_token_id
    return EndTokens(ends, ends or frozenset([] if own is None else [own]))


def blend_folder(given: Path | None) -> Path:
    """`loramux/blends` in the user's cache, if none is given."""
    if given is not None:
        return given
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "loramux" / "blends"


def warn_of_width(experts: Mapping[str, LoraAdapter], top_m: int, room: Room) -> None:
    """Say before the first request whether routed blends will be exact.

    Raises:
        StartError: an expert alone is too wide and may not be truncated.
    """
    try:
        for expert in experts.values():
            room.refuse(expert)
    except BlendError as error:
        raise StartError(str(error)) from None
    if (narrow := room.narrow(experts.values(), top_m)) is not None:
        log.warning("%s; %s", *narrow)
