"""A pool from rows: embed, cluster, train one expert per cluster, fit the router, write `pool.json`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from loramux.adapters.training.expert import ExpertOptions, ExpertReport, train_expert
from loramux.adapters.training.rows import Row, read_rows, split_held_out, user_text
from loramux.router.encoder import Encoded, Encoder
from loramux.router.encoder_place import EncoderPlace
from loramux.router.fit.embedder import EmbedderOptions
from loramux.router.fit.general_texts import general_vectors
from loramux.router.fit.router import RouterFitOptions, fit_router
from loramux.router.router import Router
from loramux.router.state import RouterState
from loramux.server.base_files import BaseFiles
from loramux.server.pool.assembly import Assembly, check_target, copy_tree
from loramux.server.pool.build_report import BuildReport, ExpertLine, write_report
from loramux.server.pool.clustering import Clustering, Embedded, cluster, embed, trained_encoder
from loramux.server.pool.manifest import ExpertEntry, PoolError
from loramux.server.pool.routing import lay_out
from loramux.server.pool.stages import Stages
from loramux.server.pool.training_base import load_training_base


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How a pool is built.

    base: a model folder, a GGUF file, an installed package with one, or a hub id in the local cache. base_id:
    what the pool calls it; None: what it calls itself, or the name of its folder. copy_base: put a folder or
    file into the pool; otherwise its absolute path is recorded (packages and hub ids are named). encoder: a
    directory, an installed package or a cached hub id; None trains a static one on the rows. experts: number
    of clusters asked for; those with fewer than `min_rows` rows are dissolved. held_out: fraction of the rows
    that nothing is trained on. dtype: as `load_training_base` has it.
    """

    base: str
    base_id: str | None = None
    name: str = "pool"
    copy_base: bool = True
    encoder: str | None = None
    experts: int = 12
    min_rows: int = 32
    held_out: float = 0.02
    quantization: str = "none"
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    expert: ExpertOptions = field(default_factory=ExpertOptions)
    embedder: EmbedderOptions = field(default_factory=EmbedderOptions)
    router: RouterFitOptions = field(default_factory=RouterFitOptions)


def build_pool(data: Sequence[Path], out: Path, options: BuildOptions) -> BuildReport:
    """Build a pool from JSONL rows into `out`.

    Every stage leaves its result in `<out>.work` with a fingerprint of its inputs: a build that was killed,
    or is run again with other options, repeats only what is not there. `out` appears, or replaces an older
    pool, when all is done.

    Args:
        data: JSONL files, or folders of them (see `find_data_files`).
        out: the pool directory.
        options: what to build.

    Raises:
        PoolError: `out` is something other than a pool, there are too few rows, or the base is not usable.
        AdapterError, RouterError: rows, options or a stage are not usable; the message says which.
    """
    check_target(out)
    rows, held = split_held_out(read_rows(data), options.held_out)
    if options.experts * options.min_rows > len(rows):
        raise PoolError(
            f"{len(rows)} rows to train on cannot fill {options.experts} clusters of at least "
            f"{options.min_rows}; ask for fewer (--experts) or smaller ones (--min-rows)"
        )
    base = BaseFiles.locate(options.base)
    base_id = options.base_id or base.id or Path(options.base).resolve().name
    model, tokenizer = load_training_base(
        base.folder,
        quantization=options.quantization,
        device=options.device,
        dtype=options.dtype,
        say=partial(print, file=sys.stderr),
    )
    stages = Stages(out.with_name(out.name + ".work"))
    location: str | Path = options.encoder or trained_encoder(
        rows, stages.folder / "encoder", options.embedder, stages
    )
    encoder = Encoder.load(location, prepare=lay_out)
    kept_vectors = embed(encoder, rows, stages, "embeddings")
    held_vectors = embed(encoder, held, stages, "held-out embeddings")
    clustering = cluster(
        rows,
        kept_vectors,
        held_vectors,
        k=options.experts,
        seed=options.seed,
        min_rows=options.min_rows,
        stages=stages,
    )
    reports = [
        train_expert(
            model,
            tokenizer,
            _of(rows, clustering.labels == number),
            _of(held, clustering.held_labels == number),
            stages.folder / "experts" / name,
            options.expert,
            base_id=base_id,
            base_hash=base.hash,
            label=f"expert {number + 1}/{len(clustering.ids)} {name}",
        )
        for number, name in enumerate(clustering.ids)
    ]
    state = fit_router(
        kept_vectors.texts,
        clustering.labels,
        clustering.ids,
        encoder.spec,
        options.router,
        general_vectors(encoder),
    )
    routed = _routed(Router(state, encoder), held, held_vectors, clustering)
    report = _report(rows, held, clustering, reports, routed)
    _assemble(out, stages.folder, options, base, base_id, location, state, report)
    return report


def _of(rows: Sequence[Row], chosen: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> list[Row]:
    return [rows[int(place)] for place in np.flatnonzero(chosen)]


def _routed(router: Router, held: Sequence[Row], vectors: Embedded, clustering: Clustering) -> list[bool]:
    """For each held-out row, whether the router's first choice is its own cluster's expert."""
    if not held:
        return []
    encoded = Encoded(vectors.texts, np.zeros(len(held), np.bool_))
    table = router.score([user_text(row) for row in held], encoded)
    return [
        router.choose(table, row).candidates[0].id == clustering.ids[int(label)]
        for row, label in enumerate(clustering.held_labels)
    ]


def _report(
    rows: Sequence[Row],
    held: Sequence[Row],
    clustering: Clustering,
    experts: Sequence[ExpertReport],
    routed: Sequence[bool],
) -> BuildReport:
    hits = np.array(routed, np.float64)
    lines = []
    for number, (name, expert) in enumerate(zip(clustering.ids, experts, strict=True)):
        own = clustering.held_labels == number
        lines.append(
            ExpertLine(
                id=name,
                rows=int((clustering.labels == number).sum()),
                held_out_rows=expert.held_out_rows,
                top_terms=tuple(clustering.terms[number]),
                steps=expert.steps,
                base_loss=expert.base_loss,
                expert_loss=expert.expert_loss,
                routed=float(hits[own].mean()) if own.any() else None,
            )
        )
    return BuildReport(
        rows=len(rows),
        held_out_rows=len(held),
        cohesion=clustering.cohesion,
        routed=float(hits.mean()) if len(hits) else None,
        experts=tuple(lines),
    )


def _assemble(
    out: Path,
    work: Path,
    options: BuildOptions,
    base: BaseFiles,
    base_id: str,
    encoder: str | Path,
    state: RouterState,
    report: BuildReport,
) -> None:
    """Put the pool together beside `out`, then move it there."""
    assembly = Assembly(out)
    for line in report.experts:
        copy_tree(work / "experts" / line.id, assembly.root / "experts" / line.id)
    write_report(report, assembly.root)
    entries = tuple(
        ExpertEntry(
            id=line.id,
            path=f"experts/{line.id}",
            description=f"Rows about {', '.join(line.top_terms[:4])}",
            rows=line.rows,
            top_terms=line.top_terms,
        )
        for line in report.experts
    )
    assembly.finish(
        options.name,
        assembly.put_base(base, base_id, copy=options.copy_base),
        entries,
        assembly.put_router(state, EncoderPlace.find(encoder)),
    )
