"""Everything that can be found wrong with a pool without serving it."""

from __future__ import annotations

from pathlib import Path

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import AdapterError
from loramux.adapters.peft_format import read_lora
from loramux.router.encoder_place import EncoderPlace
from loramux.router.errors import RouterError
from loramux.router.store import load_router
from loramux.server.base_files import BaseFiles
from loramux.server.errors import StartError
from loramux.server.pool.manifest import Pool, PoolError, read_pool, verify
from loramux.server.pool.sparse import read_entry


def base_shapes(pool: Pool) -> BaseShapes:
    """The linear modules of the pool's base, read from its `config.json`.

    Raises:
        StartError: the base is not found, or its content is not the pool's.
        BaseMismatchError: it is no causal language model.
    """
    base = BaseFiles.locate(pool.base_location, content=pool.base_content)
    try:
        folder = EncoderPlace.find(base.folder).folder
    except RouterError:
        raise PoolError(f"base {pool.base_location!r}: neither a directory nor a cached model") from None
    return BaseShapes.from_config_dir(folder, pool.manifest.base.id)


def check_pool(root: Path) -> list[str]:
    """One line for each problem: manifest, file hashes, base, every expert and sparse model, router. Empty
    means sound."""
    try:
        return verify(root) + check_content(root)
    except PoolError as error:
        return [str(error)]


def check_content(root: Path) -> list[str]:
    """The same of what the files say: base, every expert and sparse model, router.

    Raises:
        PoolError: `pool.json` itself is not usable.
    """
    pool = read_pool(root)
    problems: list[str] = []
    try:
        shapes = base_shapes(pool)
    except (StartError, AdapterError) as error:
        problems.append(str(error))
    else:
        for entry in pool.manifest.experts:
            try:
                read_lora(
                    pool.expert_dir(entry), id=entry.id, base=shapes, any_base=entry.any_base, root=root
                )
            except AdapterError as error:
                problems.append(f"expert {entry.id}: {error}")
        for sparse in pool.manifest.sparse:
            try:
                read_entry(pool, sparse, shapes)
            except AdapterError as error:
                problems.append(str(error))
    try:
        load_router(pool.router_dir, experts=[entry.id for entry in pool.manifest.experts])
    except RouterError as error:
        problems.append(f"router: {error}")
    return problems
