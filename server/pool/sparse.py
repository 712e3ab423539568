"""The sparse models of a pool, read and checked."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import AdapterError, AdapterFormatError
from loramux.adapters.sparse.model import SparseModel
from loramux.adapters.sparse.read import SparseSize, measure_sparse, read_sparse
from loramux.server.pool.manifest import MANIFEST, Pool, SparseEntry


def read_sparse_models(
    pool: Pool, shapes: BaseShapes, dtype: torch.dtype | None = None
) -> tuple[SparseModel, ...]:
    """Every sparse model, in the manifest's order; all or nothing.

    Raises:
        AdapterError: one of them is damaged, unsupported, or does not fit the base.
    """
    return tuple(read_entry(pool, entry, shapes, dtype) for entry in pool.manifest.sparse)


def reread_sparse_model(pool: Pool, shapes: BaseShapes, dtype: torch.dtype | None, id: str) -> SparseModel:
    """The sparse model of an id, as the manifest that was read has it.

    Raises:
        AdapterError: as `read_entry`.
    """
    return read_entry(pool, next(entry for entry in pool.manifest.sparse if entry.id == id), shapes, dtype)


def measure_sparse_models(pool: Pool, shapes: BaseShapes) -> dict[str, SparseSize]:
    """What every sparse model will hold in memory, from the headers of its files.

    Raises:
        AdapterError: as `read_sparse_models`, as far as configs and headers show it.
    """
    sizes = {}
    for entry in pool.manifest.sparse:
        with _named(entry):
            sizes[entry.id] = measure_sparse(
                pool.sparse_dir(entry), base=shapes, options=entry.options, root=pool.root
            )
    return sizes


def read_entry(
    pool: Pool, entry: SparseEntry, shapes: BaseShapes, dtype: torch.dtype | None = None
) -> SparseModel:
    """One sparse model of a pool.

    Raises:
        AdapterError: it is damaged, unsupported, does not fit the base, or is of another kind than the pool
            says.
    """
    with _named(entry):
        model = read_sparse(
            pool.sparse_dir(entry),
            id=entry.id,
            base=shapes,
            dtype=dtype,
            options=entry.options,
            root=pool.root,
        )
        if model.kind is not entry.kind:
            raise AdapterFormatError(f"{MANIFEST} says {entry.kind}, but the files are {model.kind}")
        return model


@contextmanager
def _named(entry: SparseEntry) -> Iterator[None]:
    """Errors begin with the model's id: an operator knows models by it."""
    try:
        yield
    except AdapterError as error:
        raise type(error)(f"sparse model {entry.id}: {error}") from error
