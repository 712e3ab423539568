"""Adding a sparse model to a pool, beside the experts."""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from loramux.adapters.adapter_files import CONFIG_FILE, TENSOR_FILE
from loramux.adapters.sparse.options import DEFAULT, ReadOptions
from loramux.adapters.sparse.read import read_sparse
from loramux.server.pool.check import base_shapes
from loramux.server.pool.manifest import (
    PoolError,
    SparseEntry,
    hash_files,
    read_pool,
    verify,
    write_manifest,
)

_SLUG = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_RESERVED = "auto"


def add_sparse(
    root: Path, folder: Path, *, id: str, description: str = "", options: ReadOptions = DEFAULT
) -> SparseEntry:
    """Copy a sparse model into a pool; the router does not change, for a sparse model is asked for by its id.

    Args:
        root: the pool.
        folder: its config and tensors, which are copied.
        id: a lower-case slug that the pool does not use yet.
        description: one line for people.
        options: what the operator decides about it; kept in the manifest.

    Raises:
        PoolError: the pool is damaged, or the id cannot be used.
        AdapterError: the model cannot be served; says why.
    """
    pool = read_pool(root)
    manifest = pool.manifest
    if problems := verify(root):
        raise PoolError(f"{root}: {problems[0]}; mend the pool first (`loramux pool check {root}`)")
    if not _SLUG.fullmatch(id) or id == _RESERVED:
        raise PoolError(
            f"sparse model id {id!r}: use a lower-case slug such as tax-law, and not {_RESERVED!r}"
        )
    if id in {manifest.base.id, *(e.id for e in manifest.experts), *(s.id for s in manifest.sparse)}:
        raise PoolError(f"sparse model id {id!r} is used in this pool already; choose another")
    model = read_sparse(folder, id=id, base=base_shapes(pool), options=options)
    place = root / "sparse" / id
    if place.exists():
        shutil.rmtree(place)
    place.mkdir(parents=True)
    for name in (CONFIG_FILE, TENSOR_FILE):
        shutil.copyfile(folder / name, place / name)
    entry = SparseEntry(
        id=id, path=f"sparse/{id}", kind=model.kind, description=description, **asdict(options)
    )
    write_manifest(root, replace(manifest, sparse=(*manifest.sparse, entry), files=hash_files(root)))
    return entry
