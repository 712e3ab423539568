"""Adding someone's PEFT LoRA to a pool, and taking one out."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loramux.adapters.peft_format import read_lora
from loramux.router.fit.router import add_expert as add_to_router
from loramux.router.fit.router import remove_expert as remove_from_router
from loramux.router.header import Header, read_header
from loramux.router.store import ROUTER_FILE, load_router, load_state
from loramux.server.pool.assembly import check_id, copy_adapter
from loramux.server.pool.change import put_manifest, sound_pool, write_router
from loramux.server.pool.check import base_shapes
from loramux.server.pool.example_texts import check_texts, routing_vectors
from loramux.server.pool.manifest import ExpertEntry, Pool, PoolError


def add_expert(
    root: Path,
    adapter: Path,
    *,
    id: str,
    texts: Sequence[str],
    description: str = "",
    any_base: bool = False,
) -> ExpertEntry:
    """Copy a PEFT LoRA into a pool and teach the router which texts it answers.

    The new centroid is the mean embedding of the texts. The classifier and the calibration are fitted again
    on the sample embeddings that the router keeps of every expert and on the new ones. The pool changes in
    one move, when its new `pool.json` replaces the old one.

    Args:
        root: the pool.
        adapter: an ordinary PEFT LoRA directory; its two files are copied.
        id: the expert's name: a lower-case slug that the pool does not use yet.
        texts: at least 2 examples of what users ask the expert.
        description: one line for people.
        any_base: accept an adapter whose config names another base; its shapes must still fit.

    Raises:
        PoolError: the pool is damaged, the id cannot be used, or there are too few texts.
        AdapterError: the adapter cannot be served; says why.
        RouterError: the router keeps no sample embeddings, or its encoder cannot be loaded.
    """
    pool = sound_pool(root)
    check_id("expert", id, pool.manifest.names)
    check_texts(id, texts)
    read_lora(adapter, id=id, base=base_shapes(pool), any_base=any_base)
    header = _header(pool)
    router = load_router(pool.router_dir, experts=[entry.id for entry in pool.manifest.experts])
    state = add_to_router(router.state, id, routing_vectors(router.encoder, id, texts))
    place = write_router(pool, header, state)
    copy_adapter(adapter, root / "experts" / id)
    entry = ExpertEntry(
        id=id, path=f"experts/{id}", description=description, rows=len(texts), any_base=any_base
    )
    put_manifest(pool, replace(pool.manifest, experts=(*pool.manifest.experts, entry)), place)
    return entry


def remove_expert(root: Path, id: str) -> None:
    """Take an expert out of a pool; the others keep their routes and their calibration.

    Raises:
        PoolError: the pool is damaged, has no such expert, or none but this.
        RouterError: the router cannot be read.
    """
    pool = sound_pool(root)
    gone = next((entry for entry in pool.manifest.experts if entry.id == id), None)
    if gone is None:
        known = ", ".join(entry.id for entry in pool.manifest.experts)
        raise PoolError(f"{root}: no expert {id!r}; it has {known}")
    if len(pool.manifest.experts) == 1:
        raise PoolError(f"{root}: {id} is the last expert; remove the pool instead")
    router = write_router(pool, _header(pool), remove_from_router(load_state(pool.router_dir), id))
    experts = tuple(entry for entry in pool.manifest.experts if entry is not gone)
    folder = pool.expert_dir(gone)
    put_manifest(pool, replace(pool.manifest, experts=experts), router, without=folder)
    shutil.rmtree(folder)


def _header(pool: Pool) -> Header:
    """What the router says of itself; its experts must be open to change."""
    header = read_header(pool.router_dir / ROUTER_FILE)
    if header.classifier == "transformer":
        raise PoolError(
            f"{pool.router_dir / ROUTER_FILE}: its classifier is a fine-tuned model, which cannot be given "
            "other classes; fine-tune it for them and build the router again"
        )
    return header
