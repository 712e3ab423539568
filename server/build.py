"""The only place where parts are made and put together."""

import logging
import time
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

from loramux.adapters.arena import Arena
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import UnsupportedAdapterError
from loramux.adapters.layers import AdapterLayers
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.peft_format import read_lora
from loramux.adapters.residency import Residency
from loramux.adapters.sparse.allowance import Allowance
from loramux.adapters.sparse.model import SparseModel
from loramux.adapters.sparse.options import ReadOptions
from loramux.adapters.sparse.read import read_sparse
from loramux.adapters.sparse.recognise import is_sparse
from loramux.adapters.sparse.shelf import Shelf
from loramux.adapters.sparse.slot import SparseSlot, place
from loramux.adapters.sparse.token_methods import token_experts
from loramux.adapters.sparse.token_mixtures import TokenMixtures
from loramux.kernels.team import release_team, releasing
from loramux.router.service import RoutingService
from loramux.server.base_files import BaseFiles
from loramux.server.connect import connect
from loramux.server.core import Core
from loramux.server.engine.gguf.weights import GgufWeights
from loramux.server.engine.grammars import Grammars
from loramux.server.engine.local import EngineLimits, LocalEngine
from loramux.server.engine.model import BaseModelError, empty_base, eos_ids_of, load_base
from loramux.server.engine.runner import logits_width
from loramux.server.engine.weights import prepare
from loramux.server.errors import StartError
from loramux.server.memory.blueprint import Blueprint, Target, loaded_bytes
from loramux.server.memory.budget import Budget, Sizes, plan_budget, router_bytes, size_text
from loramux.server.memory.room import device_room, host_room
from loramux.server.metrics import Metrics
from loramux.server.parts import Parts
from loramux.server.pool.experts import measure_experts, read_experts
from loramux.server.pool.facts import read_facts
from loramux.server.pool.manifest import MANIFEST, Pool
from loramux.server.pool.routing import load_pool_router, open_pool
from loramux.server.pool.sparse import measure_sparse_models, read_sparse_models, reread_sparse_model
from loramux.server.settings import Settings, api_keys
from loramux.server.text.prompts import ChatTokenizer
from loramux.server.traces import make_traces

log = logging.getLogger("loramux")


def build(settings: Settings) -> Parts:
    """Read the pool, load the base and connect everything; the engine is not started yet.

    Raises:
        StartError, AdapterError, RouterError: one line that names the file or setting at fault.
    """
    keys = api_keys(settings)
    traces = make_traces(settings.traces)
    pool = open_pool(settings)
    core = build_core(settings, pool)
    metrics = Metrics(
        core.base,
        core.engine.stats,
        core.residency.stats,
        sparse_stats=core.shelf.stats,
        token_bytes=lambda: core.mixtures.nbytes,
    )
    router = RoutingService(
        load_pool_router(settings, pool), observe=metrics.route_stage, after_work=release_team
    )
    return connect(
        settings,
        metrics=metrics,
        keys=keys,
        base=core.base,
        residency=core.residency,
        shelf=core.shelf,
        mixtures=core.mixtures,
        engine=core.engine,
        router=router,
        tokenizer=core.tokenizer,
        grammars=core.grammars,
        read=core.read,
        adapter_root=settings.adapter_root or pool.root / "experts",
        fingerprint=fingerprint(pool),
        traces=traces,
        sampling=pool.manifest.sampling,
        facts=read_facts(pool),
    )


@releasing
def build_core(settings: Settings, pool: Pool, *, among: int = 1, devices: int | None = None) -> Core:
    """What generates: the base with its experts, and the engine over them, which is not started yet.

    `among` processes on this machine start at once and share its memory and `devices` GPUs; unset: those that
    are visible here.

    Raises:
        StartError, AdapterError: one line that names the file or setting at fault.
    """
    files = base_files(settings, pool)
    blueprint = Blueprint.read(files.folder)
    weights = files.weights()
    target = blueprint.target(
        device=settings.device,
        dtype=settings.dtype,
        quantization=settings.quantization,
        weights=weights,
        invariant=settings.engine.batch_invariant,
    )
    shapes = blueprint.shapes(pool.manifest.base.id)
    budget = make_budget(settings, pool, target, blueprint, among, devices)
    model = load_model(files.folder, target, budget, weights)
    del weights  # and the file that it maps
    tokenizer = load_tokenizer(files.folder, settings.chat_template)
    read = partial(
        read_adapter,
        shapes=shapes,
        dtype=target.dtype,
        host_dtype=target.host_dtype,
        pinned=target.device.type == "cuda",
    )
    experts = read_experts(pool, shapes, target.host_dtype)
    if target.device.type == "cuda":
        experts = {name: expert.pinned() for name, expert in experts.items()}
    arena = Arena(shapes, budget.rows, dtype=target.dtype, device=model.device)
    residency = make_residency(settings, experts, arena)
    layers = AdapterLayers(model, arena)
    grammars = make_grammars(tokenizer, model)
    engine = make_engine(settings, model, layers, budget.kv_tokens, grammars)
    sparse = read_sparse_models(pool, shapes, target.dtype)
    allowance = Allowance(settings.residency.sparse_bytes + sum(one.nbytes for one in sparse))
    placing = partial(place_model, layers=layers, device=model.device, dtype=target.dtype)
    # On a CPU they would lie beside the files' pages for nothing until one is asked for; on a device their
    # memory is set apart anyway, and a first request that reads files would be slow.
    waits = target.device.type == "cpu"
    again = partial(reread_sparse_model, pool, shapes, target.dtype)
    shelf = Shelf(placing, sparse, allowance, again if waits else None)
    preparing = partial(token_experts, device=model.device, dtype=target.dtype)
    mixtures = TokenMixtures(preparing, allowance, target.dtype)
    return Core(
        base=pool.manifest.base.id,
        residency=residency,
        shelf=shelf,
        mixtures=mixtures,
        engine=engine,
        tokenizer=tokenizer,
        grammars=grammars,
        read=read,
        eos_ids=tuple(eos_ids_of(model)),
        width=logits_width(model),
        rows=budget.rows,
    )


def base_files(settings: Settings, pool: Pool) -> BaseFiles:
    """The files of the base: the settings' own, or the pool's, whose content then is the pool's too.

    Raises:
        StartError: there is no such base, or it is damaged, or another than the pool was made with.
    """
    if settings.base is not None:
        return BaseFiles.locate(settings.base)
    return BaseFiles.locate(pool.base_location, content=pool.base_content)


def load_tokenizer(location: str, chat_template: Path | None = None) -> ChatTokenizer:
    """The base's fast tokenizer; no code of the checkpoint runs.

    `chat_template`: a file with the one to use in place of its own.

    Raises:
        StartError: there is none, or only a slow one; the template cannot be read, or renders no message.
    """
    try:
        tokenizer: ChatTokenizer = AutoTokenizer.from_pretrained(
            location, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise StartError(f"tokenizer of {location}: {str(error).strip().splitlines()[0]}") from None
    if chat_template is not None:
        try:
            tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
            tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
        except Exception as error:  # whatever a template can do
            raise StartError(f"chat_template {chat_template}: {' '.join(str(error).split())}") from None
    return tokenizer


def make_budget(
    settings: Settings,
    pool: Pool,
    target: Target,
    blueprint: Blueprint,
    among: int = 1,
    devices: int | None = None,
) -> Budget:
    """Who gets how much memory, decided before any weight is read.

    Raises:
        StartError: it does not fit; the line has the numbers and the settings to lower.
        AdapterError: an expert's config or header shows that it cannot be served.
    """
    shapes = blueprint.shapes(pool.manifest.base.id)
    sizes = Sizes(
        blueprint,
        shapes,
        experts=measure_experts(pool, shapes),
        router_bytes=router_bytes(pool, settings.encoder),
        sparse=measure_sparse_models(pool, shapes),
    )
    device = device_room(target.device).shared(
        among if target.device.type == "cpu" else -(-among // (devices or torch.cuda.device_count()))
    )
    budget = plan_budget(settings, target, sizes, device, host_room().shared(among))
    log.info("memory\n%s", budget.table())
    return budget


def load_model(
    location: str, target: Target, budget: Budget, weights: GgufWeights | None = None
) -> PreTrainedModel:
    """The base's weights, where and how the budget has them; `weights` as they lie in a GGUF file.

    Raises:
        StartError: a file is missing or damaged.
    """
    kinds = target.kinds
    try:
        if weights is not None and kinds is not None:
            model = empty_base(location)
        else:
            model = load_base(
                location,
                dtype=target.dtype_name if kinds is None else "stored",
                quantization="none" if kinds is not None else target.quantization,
                device=str(target.device),
            )
    except BaseModelError as error:
        raise StartError(str(error)) from None
    if target.why:
        log.info("base: %s", target.why)
    prepare(model, target.device, target.dtype, kinds, weights, invariant=target.invariant)
    held = loaded_bytes(model)
    log.info("base: %s estimated, %s loaded", size_text(budget.base), size_text(held))
    return model


def make_residency(settings: Settings, experts: dict[str, LoraAdapter], arena: Arena) -> Residency:
    """The blends on the device; with `residency.preload`, the experts are there from the start."""
    residency = Residency(experts, arena, max_blends=settings.residency.max_blends)
    if settings.residency.preload:
        started = time.monotonic()
        count = residency.preload()
        log.info("%d of %d experts in their rows in %.2f s", count, len(experts), time.monotonic() - started)
    return residency


def make_engine(
    settings: Settings, model: PreTrainedModel, layers: AdapterLayers, kv_tokens: int, grammars: Grammars
) -> LocalEngine:
    """The engine of this process."""
    chosen = settings.engine
    limits = EngineLimits(
        max_running=chosen.max_running,
        max_waiting=chosen.max_waiting,
        kv_tokens=kv_tokens,
        max_batch_tokens=chosen.max_batch_tokens,
        prefix_sharing=chosen.prefix_sharing,
        graphs=chosen.cuda_graphs == "auto" and model.device.type == "cuda",
        invariant=chosen.batch_invariant,
    )
    return LocalEngine(model, layers, eos_ids=eos_ids_of(model), limits=limits, grammars=grammars)


def make_grammars(tokenizer: ChatTokenizer, model: PreTrainedModel) -> Grammars:
    """Grammars over the base's vocabulary, as wide as its rows of logits."""
    return Grammars(tokenizer, eos_ids_of(model), logits_width(model))


def fingerprint(pool: Pool) -> str:
    """`system_fingerprint`: of the manifest, which holds the hash of every file."""
    digest = sha256((pool.root / MANIFEST).read_bytes()).hexdigest()
    return f"loramux-{digest[:12]}"


def place_model(
    model: SparseModel, *, layers: AdapterLayers, device: torch.device, dtype: torch.dtype
) -> SparseSlot:
    """A sparse model on the device, with the base's layers ready for it.

    Raises:
        AdapterError: the base has no such module.
    """
    slot = place(model, device, dtype)
    layers.prepare(slot)
    return slot


@releasing
def read_adapter(
    folder: Path,
    name: str,
    options: ReadOptions,
    *,
    shapes: BaseShapes,
    dtype: torch.dtype | None,
    host_dtype: torch.dtype | None,
    pinned: bool,
) -> LoraAdapter | SparseModel:
    """A directory below the adapter root, whichever of the two it holds: a LoRA in `host_dtype`, or a sparse
    model in `dtype`.

    Raises:
        AdapterError: it is damaged, unsupported, or does not fit the base, or an option is not for its kind.
    """
    if is_sparse(folder):
        return read_sparse(folder, id=name, base=shapes, dtype=dtype, options=options)
    if given := sorted(key for key, value in asdict(replace(options, any_base=False)).items() if value):
        raise UnsupportedAdapterError(f"{given[0]} is for sparse models; {folder.name} is a LoRA")
    adapter = read_lora(folder, id=name, base=shapes, dtype=host_dtype, any_base=options.any_base)
    return adapter.pinned() if pinned else adapter
