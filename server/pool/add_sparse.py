"""Adding a sparse model to a pool, beside the experts."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from loramux.adapters.sparse.options import DEFAULT, ReadOptions
from loramux.adapters.sparse.read import read_sparse
from loramux.server.pool.assembly import check_id, copy_adapter
from loramux.server.pool.check import base_shapes
from loramux.server.pool.manifest import (
    PoolError,
    SparseEntry,
    hash_files,
    read_pool,
    verify,
    write_manifest,
)


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
    check_id("sparse model", id, pool.manifest.names)
    model = read_sparse(folder, id=id, base=base_shapes(pool), options=options)
    copy_adapter(folder, root / "sparse" / id)
    entry = SparseEntry(
        id=id, path=f"sparse/{id}", kind=model.kind, description=description, **asdict(options)
    )
    write_manifest(root, replace(manifest, sparse=(*manifest.sparse, entry), files=hash_files(root)))
    return entry
