"""The only place where parts are made and put together."""

import logging
import os
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

from loramux.adapters.arena import Arena, row_bytes
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.layers import AdapterLayers
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.peft_format import read_lora
from loramux.adapters.residency import Residency
from loramux.router.router import Router as PoolRouter
from loramux.router.service import RoutingService
from loramux.router.store import load_router
from loramux.server.admin import AdapterAdmin
from loramux.server.catalog import Catalog
from loramux.server.engine.local import EngineLimits, LocalEngine
from loramux.server.engine.model import BaseModelError, load_base
from loramux.server.engine.protocol import Engine
from loramux.server.errors import StartError
from loramux.server.intake import Intake
from loramux.server.lifecycle import Lifecycle
from loramux.server.metrics import Metrics
from loramux.server.parts import Parts
from loramux.server.pipeline import Pipeline
from loramux.server.pool.experts import read_experts
from loramux.server.pool.manifest import MANIFEST, Pool, PoolError, read_pool, verify
from loramux.server.selection import Router, Selector, options_of
from loramux.server.settings import Settings, api_keys
from loramux.server.text.prompts import ChatTokenizer, Prompts
from loramux.server.text.vocabulary import Vocabulary

log = logging.getLogger("loramux")


def build(settings: Settings) -> Parts:
    """Read the pool, load the base and connect everything; the engine is not started yet.

    Raises:
        StartError, AdapterError, RouterError: one line that names the file or setting at fault.
    """
    keys = api_keys(settings)
    pool = open_pool(settings)
    location = settings.base or pool.base_location
    try:
        model = load_base(
            location, dtype=settings.dtype, quantization=settings.quantization, device=settings.device
        )
    except BaseModelError as error:
        raise StartError(str(error)) from None
    tokenizer = load_tokenizer(location)
    shapes = BaseShapes.from_model(model, pool.manifest.base.id)
    experts = read_experts(pool, shapes, model.dtype)
    arena = make_arena(settings, model, shapes, experts)
    residency = Residency(experts, arena, max_blends=settings.residency.max_blends)
    engine = make_engine(settings, model, AdapterLayers(model, arena))
    metrics = Metrics(
        pool.manifest.base.id, engine.stats, residency.stats, max_blends=settings.residency.max_blends
    )
    router = RoutingService(load_pool_router(settings, pool), observe=metrics.route_stage)
    return connect(
        settings,
        metrics=metrics,
        keys=keys,
        base=pool.manifest.base.id,
        residency=residency,
        engine=engine,
        router=router,
        tokenizer=tokenizer,
        read=partial(_read_adapter, shapes=shapes, dtype=model.dtype),
        adapter_root=settings.adapter_root or pool.root / "experts",
        fingerprint=fingerprint(pool),
    )


def connect(
    settings: Settings,
    *,
    metrics: Metrics,
    keys: tuple[str, ...],
    base: str,
    residency: Residency,
    engine: Engine,
    router: Router,
    tokenizer: ChatTokenizer,
    read: Callable[[Path, str], LoraAdapter],
    adapter_root: Path,
    fingerprint: str,
) -> Parts:
    """The parts of a server around a residency, an engine and a router, whichever they are."""
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    catalog = Catalog(base, residency.experts, engine.max_context)
    prompts = Prompts(tokenizer, vocabulary, engine.max_context)
    lifecycle = Lifecycle()
    selector = Selector(
        catalog=catalog,
        router=router,
        merge=settings.routing.merge,
        weight_step=settings.residency.weight_step,
        metrics=metrics,
    )
    pipeline = Pipeline(
        selector=selector,
        residency=residency,
        engine=engine,
        vocabulary=vocabulary,
        metrics=metrics,
        lifecycle=lifecycle,
    )
    return Parts(
        settings=settings,
        api_keys=keys,
        lifecycle=lifecycle,
        catalog=catalog,
        prompts=prompts,
        vocabulary=vocabulary,
        intake=Intake(prompts, catalog),
        router=router,
        selector=selector,
        residency=residency,
        engine=engine,
        pipeline=pipeline,
        metrics=metrics,
        admin=AdapterAdmin(catalog, residency, adapter_root, read),
        fingerprint=fingerprint,
    )


def open_pool(settings: Settings) -> Pool:
    """The pool of the settings, every file compared with its hash where that is asked for.

    Raises:
        PoolError: the first thing that is wrong.
    """
    pool = read_pool(settings.pool)
    problems = verify(settings.pool) if settings.verify_pool else []
    if problems:
        more = f" (and {len(problems) - 1} more; `loramux pool check` lists them)" if problems[1:] else ""
        raise PoolError(f"pool {settings.pool}: {problems[0]}{more}")
    return pool


def load_pool_router(settings: Settings, pool: Pool) -> PoolRouter:
    """The router of a pool, with the settings' defaults.

    Raises:
        RouterError: one line that names the file or option at fault.
    """
    return load_router(
        pool.router_dir,
        experts=[entry.id for entry in pool.manifest.experts],
        encoder=settings.encoder,
        defaults=options_of(settings.routing),
    )


def load_tokenizer(location: str) -> ChatTokenizer:
    """The base's fast tokenizer; no code of the checkpoint runs.

    Raises:
        StartError: there is none, or only a slow one.
    """
    try:
        tokenizer: ChatTokenizer = AutoTokenizer.from_pretrained(
            location, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise StartError(f"tokenizer of {location}: {str(error).strip().splitlines()[0]}") from None
    return tokenizer


def make_arena(
    settings: Settings, model: PreTrainedModel, shapes: BaseShapes, experts: dict[str, LoraAdapter]
) -> Arena:
    """The memory for resident adapters, within the setting and not far over what all experts need.

    Raises:
        StartError: the setting is too small for the largest expert.
    """
    unit = row_bytes(shapes, model.dtype)
    rows = settings.residency.bytes // unit
    largest = max((expert.max_rank for expert in experts.values()), default=1)
    if rows < largest:
        raise StartError(
            f"residency.bytes is {settings.residency.bytes}; the largest expert alone needs {largest * unit}"
        )
    useful = 2 * sum(expert.max_rank for expert in experts.values()) + 16 * largest
    arena = Arena(shapes, min(rows, useful), dtype=model.dtype, device=model.device)
    log.info("adapters: %d rows, %.1f MiB", arena.rows, arena.rows * unit / 2**20)
    return arena


def make_engine(settings: Settings, model: PreTrainedModel, layers: AdapterLayers) -> LocalEngine:
    """The engine of this process, its cache sized by the setting or by what memory is free."""
    chosen = settings.engine
    limits = EngineLimits(
        max_running=chosen.max_running,
        max_waiting=chosen.max_waiting,
        kv_tokens=chosen.kv_tokens or _kv_tokens(model, chosen.max_running),
        max_batch_tokens=chosen.max_batch_tokens,
        prefix_sharing=chosen.prefix_sharing,
    )
    generation = model.generation_config.eos_token_id if model.generation_config else None
    eos = model.config.eos_token_id if generation is None else generation
    eos_ids = [eos] if isinstance(eos, int) else list(eos or ())
    return LocalEngine(model, layers, eos_ids=eos_ids, limits=limits)


def fingerprint(pool: Pool) -> str:
    """`system_fingerprint`: of the manifest, which holds the hash of every file."""
    digest = sha256((pool.root / MANIFEST).read_bytes()).hexdigest()
    return f"loramux-{digest[:12]}"


def _kv_tokens(model: PreTrainedModel, max_running: int) -> int:
    """Room for `max_running` full contexts, or for what half of the free memory holds."""
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head * model.dtype.itemsize
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    wanted = max_running * int(config.max_position_embeddings)
    return max(1024, min(wanted, int(free // 2 // token_bytes)))


def _read_adapter(folder: Path, name: str, *, shapes: BaseShapes, dtype: torch.dtype) -> LoraAdapter:
    return read_lora(folder, id=name, base=shapes, dtype=dtype)
