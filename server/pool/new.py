"""A pool of adapters that exist already: nothing is trained but the router, from a few texts of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.peft_format import read_lora
from loramux.router.encoder import Encoder
from loramux.router.encoder_place import DEFAULT_ENCODER, EncoderPlace
from loramux.router.errors import RouterError
from loramux.router.fit.general_texts import general_vectors
from loramux.router.fit.router import RouterFitOptions, fit_router
from loramux.router.router import Router
from loramux.server.base_files import BaseFiles
from loramux.server.pool.assembly import Assembly, check_id, check_target, copy_adapter
from loramux.server.pool.example_texts import check_texts, routing_vectors
from loramux.server.pool.manifest import ExpertEntry, PoolError
from loramux.server.pool.routing import lay_out


@dataclass(frozen=True, slots=True)
class NewExpert:
    """One adapter of a new pool: its id, its PEFT folder, and texts that it should answer (2 at least)."""

    id: str
    adapter: Path
    texts: Sequence[str]
    description: str = ""


@dataclass(frozen=True, slots=True)
class NewOptions:
    """How a pool is begun.

    base, base_id, name, copy_base: as `BuildOptions`. encoder: a directory, an installed package or a cached
    hub id. any_base: accept adapters whose config names another base; their shapes must still fit.
    """

    base: str
    base_id: str | None = None
    name: str = "pool"
    copy_base: bool = True
    encoder: str = DEFAULT_ENCODER
    any_base: bool = False
    router: RouterFitOptions = field(default_factory=RouterFitOptions)


def new_pool(out: Path, experts: Sequence[NewExpert], options: NewOptions) -> dict[str, float]:
    """Make a pool in `out` out of adapters; it replaces an older pool there when all is done.

    Returns:
        for every expert, the share of its own texts that the router sends to it first. They are the texts
        that it was fitted with: less than all means that two experts are hard to tell apart.

    Raises:
        PoolError: no experts, an id that cannot be used, too few texts, or `out` is something else.
        StartError: the base is not found.
        AdapterError: an adapter cannot be served on the base; says why.
        RouterError: the encoder cannot be loaded.
    """
    check_target(out)
    if not experts:
        raise PoolError("a pool needs at least one expert")
    base = BaseFiles.locate(options.base)
    base_id = options.base_id or base.id or Path(options.base).resolve().name
    shapes = BaseShapes.from_config_dir(_folder(base), base_id)
    taken = {base_id}
    for expert in experts:
        check_id("expert", expert.id, taken)
        taken.add(expert.id)
        check_texts(expert.id, expert.texts)
        read_lora(expert.adapter, id=expert.id, base=shapes, any_base=options.any_base)
    place = EncoderPlace.find(options.encoder)
    encoder = Encoder.load(options.encoder, prepare=lay_out)
    vectors = [routing_vectors(encoder, expert.id, expert.texts) for expert in experts]
    labels = np.repeat(np.arange(len(experts)), [len(rows) for rows in vectors])
    state = fit_router(
        np.concatenate(vectors),
        labels,
        [expert.id for expert in experts],
        encoder.spec,
        options.router,
        general_vectors(encoder),
    )
    assembly = Assembly(out)
    for expert in experts:
        copy_adapter(expert.adapter, assembly.root / "experts" / expert.id)
    entries = tuple(
        ExpertEntry(
            id=expert.id,
            path=f"experts/{expert.id}",
            description=expert.description,
            rows=len(expert.texts),
            any_base=options.any_base,
        )
        for expert in experts
    )
    assembly.finish(
        options.name,
        assembly.put_base(base, base_id, copy=options.copy_base),
        entries,
        assembly.put_router(state, place),
    )
    router = Router(state, encoder)
    return {expert.id: _found(router, expert) for expert in experts}


def _found(router: Router, expert: NewExpert) -> float:
    decisions = router.decide(expert.texts)
    first = [bool(one.experts) and one.experts[0].id == expert.id for one in decisions]
    return sum(first) / len(first)


def _folder(base: BaseFiles) -> Path:
    try:
        return EncoderPlace.find(base.folder).folder
    except RouterError:
        raise PoolError(f"base {base.given!r}: neither a directory nor a cached model") from None
