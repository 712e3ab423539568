"""Loads a pool's base, puts one adapter after the other into it, and measures importance by task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.importance.measure import measure_importance
from loramux.adapters.importance.probes import Probes, make_probes
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.peft_format import read_lora
from loramux.adapters.sparse.model import SparseModel
from loramux.adapters.sparse.read import read_sparse
from loramux.adapters.sparse.recognise import is_sparse
from loramux.adapters.training.chat import EncodedRow, encode_rows
from loramux.server.base_files import BaseFiles
from loramux.server.errors import StartError
from loramux.server.evaluation.items import AnswerItem, read_items
from loramux.server.importance.result import Analysis, System
from loramux.server.memory.budget import size_text
from loramux.server.memory.room import host_room
from loramux.server.pool.manifest import Pool, read_pool
from loramux.server.pool.sparse import read_entry
from loramux.server.pool.training_base import load_training_base

#: Called with what is being done, how many rows are done, and how many there are.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured.

    data: files and folders of rows. adapters: directories beside the pool's own, by name. only: ids of the
    pool; empty: its sparse models, or the experts where neither a sparse model nor an adapter is there.
    limit: rows of each task. max_tokens: longer rows lose the end of their answer. each_row: see
    `measure_importance`. device: auto, cpu, cuda or cuda:N.
    """

    data: tuple[Path, ...]
    adapters: Mapping[str, Path]
    only: tuple[str, ...] = ()
    limit: int | None = 20
    max_tokens: int = 512
    batch_tokens: int = 1024
    each_row: bool = False
    seed: int = 0
    device: str = "auto"


def analyse(root: Path, options: Options, progress: Progress = lambda *_: None) -> Analysis:
    """Importance of every rank of the chosen systems for every task of the data.

    Raises:
        StartError, AdapterError: what is wrong with the pool, the adapters or the data; too little memory.
    """
    pool = read_pool(root)
    items = read_items(options.data, limit=options.limit, seed=options.seed)
    progress("loading the base", 0, 0)
    files = BaseFiles.locate(pool.base_location, content=pool.base_content)
    shapes = BaseShapes.from_config_dir(files.folder, pool.manifest.base.id)
    chosen = _chosen(pool, shapes, options)
    model, tokenizer = load_training_base(files.folder, device=options.device)
    model = model.float()
    tasks: dict[str, list[EncodedRow]] = {}
    for task, found in items.items():
        rows = [item.row for item in found if isinstance(item, AnswerItem)]
        encoded = encode_rows(tokenizer, rows, options.max_tokens)
        if kept := [row for row in encoded if row.answer_start < len(row)]:
            tasks[task] = kept
    if not tasks:
        raise StartError("no row of the data has an answer; give rows with instruction, input and output")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    systems = []
    for name, adapter in chosen.items():
        probes = make_probes(model, adapter)
        _check_memory(name, probes, len(tasks))
        systems.append(_system(name, adapter, probes, model, tasks, pad, options, progress))
    about = {
        "rows": {task: len(rows) for task, rows in tasks.items()},
        "seed": options.seed,
        "limit": options.limit,
        "max_tokens": options.max_tokens,
        "each_row": options.each_row,
    }
    return Analysis(pool.manifest.name, pool.manifest.base.id, systems, about)


def _system(
    name: str,
    adapter: LoraAdapter | SparseModel,
    probes: Probes,
    model: Any,
    tasks: Mapping[str, Sequence[EncodedRow]],
    pad: int,
    options: Options,
    progress: Progress,
) -> System:
    whole = sum(len(rows) for rows in tasks.values())
    found, before = {}, 0
    for task, rows in tasks.items():
        found[task] = measure_importance(
            model,
            probes,
            rows,
            pad_id=pad,
            batch_tokens=options.batch_tokens,
            each_row=options.each_row,
            progress=lambda done, before=before: progress(name, before + done, whole),  # type: ignore[misc]
        )
        before += len(rows)
    kind = "lora" if isinstance(adapter, LoraAdapter) else str(adapter.kind)
    return System(name, kind, probes.numbers, found)


def _chosen(pool: Pool, shapes: BaseShapes, options: Options) -> dict[str, LoraAdapter | SparseModel]:
    """The systems, read and checked, by name."""
    experts = {entry.id: entry for entry in pool.manifest.experts}
    sparse = {entry.id: entry for entry in pool.manifest.sparse}
    wanted = options.only or tuple(sparse)
    if not wanted and not options.adapters:
        wanted = tuple(experts)
    if unknown := sorted(set(wanted) - {*experts, *sparse}):
        raise StartError(f"pool {pool.root} has no {unknown[0]!r}; it has {', '.join([*experts, *sparse])}")
    found: dict[str, LoraAdapter | SparseModel] = {}
    for name in wanted:
        if name in sparse:
            found[name] = read_entry(pool, sparse[name], shapes)
        else:
            entry = experts[name]
            folder = pool.expert_dir(entry)
            found[name] = read_lora(folder, id=name, base=shapes, any_base=entry.any_base, root=pool.root)
    for name, folder in options.adapters.items():
        if name in found:
            raise StartError(f"--adapter {name}: the pool has one of that name; choose another")
        read = read_sparse if is_sparse(folder) else read_lora
        found[name] = read(folder, id=name, base=shapes)
    return found


def _check_memory(name: str, probes: Probes, tasks: int) -> None:
    """Scores are kept for every parameter and task, and statistics work on copies in float64.

    Raises:
        StartError: there is no room.
    """
    needed = 4 * probes.numbers * (tasks + 4)
    room = host_room()
    if needed > room.free:
        raise StartError(
            f"{name}: scores of {probes.numbers} parameters for {tasks} tasks need {size_text(needed)}, "
            f"{size_text(room.free)} are free on {room.name}; give fewer tasks with --data"
        )
