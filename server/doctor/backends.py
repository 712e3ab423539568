"""What is to generate in place of this process: whether each backend answers, and is what it has to be."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from functools import partial

from loramux.adapters.errors import BlendError
from loramux.adapters.lora import LoraAdapter
from loramux.server.assemble import refuse_both
from loramux.server.backend.errors import BackendDown, BackendError
from loramux.server.backend.fleet import Fleet
from loramux.server.backend.folders import BlendFolders, FolderInUse
from loramux.server.backend.front import (
    WHY_SPARSE,
    blend_folder,
    end_tokens,
    expected_base,
    probes,
    refuse_strategy,
    vllm_fleet,
)
from loramux.server.backend.protocol import AdapterBackend, BackendFacts
from loramux.server.backend.room import Room
from loramux.server.base_files import BaseFiles
from loramux.server.build import load_tokenizer
from loramux.server.doctor.finding import Finding, Level
from loramux.server.errors import StartError
from loramux.server.memory.blueprint import Blueprint
from loramux.server.pool.manifest import Pool
from loramux.server.settings import Settings

Asked = dict[str, BackendFacts | BackendError]


def backends(
    settings: Settings, pool: Pool, files: BaseFiles, experts: Mapping[str, LoraAdapter]
) -> Iterator[Finding]:
    """What in front of backends cannot be, how wide blends may be, and each backend."""
    try:
        refuse_both(settings)
        refuse_strategy(settings.routing.strategy)
    except StartError as error:
        yield Finding("settings", Level.PROBLEM, str(error))
    for entry in pool.manifest.sparse:
        yield Finding("sparse", Level.WARNING, f"{entry.id} ({entry.kind}) is not served: {WHY_SPARSE}")
    yield from _width(settings, experts)
    try:
        tokenizer = load_tokenizer(files.folder, settings.chat_template)
    except StartError as error:
        yield Finding("base", Level.PROBLEM, str(error))
        return
    expected = expected_base(settings, pool, files, tokenizer)
    fleet_of = partial(vllm_fleet, settings, expected, end_tokens(files.folder, tokenizer))
    try:
        folders = BlendFolders(blend_folder(settings.backend.folder), there=settings.backend.folder_there)
    except FolderInUse as error:
        advice = "adapters are not tried then; a second server needs another backend.folder"
        yield Finding("folder", Level.NOTE, str(error), advice)
        yield from _judged(asyncio.run(_ask(fleet_of({}))), "adapters were not tried")
        return
    except StartError as error:
        yield Finding("folder", Level.PROBLEM, str(error), "name one that can be written in backend.folder")
        return
    try:
        yield Finding("folder", Level.OK, f"{folders.root} can be written")
        rank = settings.backend.max_lora_rank
        shapes = Blueprint.read(files.folder).shapes(pool.manifest.base.id)
        asked = asyncio.run(_ask(fleet_of(probes(folders, experts, shapes, rank))))
        yield from _judged(asked, f"takes adapters of rank {rank}")
    finally:
        folders.close()


def _width(settings: Settings, experts: Mapping[str, LoraAdapter]) -> Iterator[Finding]:
    room = Room.of(settings.backend)
    for expert in experts.values():
        try:
            room.refuse(expert)
        except BlendError as error:
            yield Finding("ranks", Level.PROBLEM, str(error))
    narrow = room.narrow(experts.values(), settings.routing.top_m)
    if narrow is None:
        text = f"every blend of {settings.routing.top_m} experts is exact at rank {room.ranks[-1]}"
        yield Finding("ranks", Level.OK, text)
    else:
        yield Finding("ranks", Level.WARNING, *narrow)


async def _ask(fleet: Fleet[AdapterBackend]) -> Asked:
    """What each says of itself, or what is wrong with it."""
    found: Asked = {}
    await fleet.open()
    try:
        for member in fleet.members:
            try:
                found[member.url] = await fleet.known(member)
            except BackendError as error:
                found[member.url] = error
    finally:
        await fleet.close()
    return found


def _judged(asked: Asked, adapters: str) -> Iterator[Finding]:
    """One that is down keeps the server from starting only where no other answers."""
    answering = any(isinstance(told, BackendFacts) for told in asked.values())
    for url, told in asked.items():
        if isinstance(told, BackendFacts):
            text = (
                f"{url}: {told.kind} {told.version}, base {told.base}, {told.max_context} tokens of context, "
                f"{len(told.adapters)} adapters loaded; {adapters}"
            )
            yield Finding("backend", Level.OK, text)
        elif isinstance(told, BackendDown):
            level = Level.WARNING if answering else Level.PROBLEM
            yield Finding("backend", level, told.what, "start it, or take it out of backend.urls")
        else:
            yield Finding("backend", Level.PROBLEM, told.what, told.way)
