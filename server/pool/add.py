"""Adding someone's PEFT LoRA to a pool."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loramux.adapters.adapter_files import CONFIG_FILE, TENSOR_FILE
from loramux.adapters.peft_format import read_lora
from loramux.adapters.training.rows import Row, user_text
from loramux.router.fit.router import add_expert as add_to_router
from loramux.router.header import read_header
from loramux.router.store import ROUTER_FILE, load_router, save_router
from loramux.server.pool.check import base_shapes
from loramux.server.pool.manifest import (
    ExpertEntry,
    Manifest,
    Pool,
    PoolError,
    hash_files,
    read_pool,
    verify,
    write_manifest,
)

_SLUG = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_RESERVED = "auto"


def add_expert(
    root: Path,
    adapter: Path,
    *,
    id: str,
    rows: Sequence[Row],
    description: str = "",
    any_base: bool = False,
) -> ExpertEntry:
    """Copy a PEFT LoRA into a pool and teach the router which texts it answers.

    The new centroid is the mean embedding of the rows' user texts. The classifier and the calibration are
    fitted again on the sample embeddings that the router keeps of every expert and on the new rows. The pool
    changes in one move, when its new `pool.json` replaces the old one.

    Args:
        root: the pool.
        adapter: an ordinary PEFT LoRA directory; its two files are copied.
        id: the expert's name: a lower-case slug that the pool does not use yet.
        rows: at least 2 examples of what the expert is for.
        description: one line for people.
        any_base: accept an adapter whose config names another base; its shapes must still fit.

    Raises:
        PoolError: the pool is damaged, the id cannot be used, or there are too few rows.
        AdapterError: the adapter cannot be served; says why.
        RouterError: the router keeps no sample embeddings, or its encoder cannot be loaded.
    """
    pool = read_pool(root)
    manifest = pool.manifest
    if problems := verify(root):
        raise PoolError(f"{root}: {problems[0]}; mend the pool first (`loramux pool check {root}`)")
    if not _SLUG.fullmatch(id) or id == _RESERVED:
        raise PoolError(f"expert id {id!r}: use a lower-case slug such as tax-law, and not {_RESERVED!r}")
    if id in {manifest.base.id, *(e.id for e in manifest.experts), *(s.id for s in manifest.sparse)}:
        raise PoolError(f"expert id {id!r} is used in this pool already; choose another")
    if len(rows) < 2:
        raise PoolError(f"{len(rows)} example rows are too few to route by; give at least 2, better 50")
    read_lora(adapter, id=id, base=base_shapes(pool), any_base=any_base)
    place = root / "experts" / id
    if place.exists():
        shutil.rmtree(place)
    place.mkdir(parents=True)
    for name in (CONFIG_FILE, TENSOR_FILE):
        shutil.copyfile(adapter / name, place / name)
    router = _extended_router(pool, id, rows)
    entry = ExpertEntry(
        id=id, path=f"experts/{id}", description=description, rows=len(rows), any_base=any_base
    )
    old = manifest.router.path.rstrip("/")
    files = {name: value for name, value in hash_files(root).items() if not name.startswith(f"{old}/")}
    experts = (*manifest.experts, entry)
    changed: Manifest = replace(
        manifest, experts=experts, router=replace(manifest.router, path=router.name), files=files
    )
    write_manifest(root, changed)
    shutil.rmtree(root / old)
    return entry


def _extended_router(pool: Pool, id: str, rows: Sequence[Row]) -> Path:
    """A copy of the pool's router that knows one more expert, in a new folder beside the old one."""
    header = read_header(pool.router_dir / ROUTER_FILE)
    if header.classifier == "transformer":
        raise PoolError(
            f"{pool.router_dir / ROUTER_FILE}: its classifier is a fine-tuned model, which cannot be given "
            "another class; fine-tune it with the new expert and build the router again"
        )
    router = load_router(pool.router_dir, experts=[entry.id for entry in pool.manifest.experts])
    vectors = router.encoder.encode([user_text(row) for row in rows]).vectors
    state = add_to_router(router.state, id, vectors)
    number = 2
    while (pool.root / f"router-{number}").resolve() == pool.router_dir:
        number += 1
    place = pool.root / f"router-{number}"
    if place.exists():
        shutil.rmtree(place)
    shutil.copytree(pool.router_dir, place)
    save_router(state, place, encoder_path=header.encoder_path)
    return place
