"""Measuring the cells of one trained model through the serving engine; each leaves a record."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.quality.gating import Chosen, Gate
from benchmarks.quality.setting import Cell, Model, Setting
from benchmarks.quality.texts import TestSet
from benchmarks.quality.training import Trained
from loramux.server.build import build, load_tokenizer
from loramux.server.evaluation.items import ChoiceItem, Item
from loramux.server.evaluation.ledger import Ledger
from loramux.server.evaluation.measuring import Measuring
from loramux.server.evaluation.score import Score
from loramux.server.parts import Parts
from loramux.server.settings import load_settings

Asked = tuple[str, str]


def cell_file(out: Path, cell: Cell, seed: int) -> Path:
    """Where the record of a cell lies."""
    return out / "cells" / f"{cell.name.replace(' ', '_').replace('/', '-')}-s{seed}.json"


def identity(setting: Setting, model: Model, cell: Cell, seed: int, tests: TestSet) -> str:
    """Stands for everything that a cell's numbers depend on."""
    fixed = {
        key: value
        for key, value in asdict(setting).items()
        if key not in ("name", "about", "models", "cells", "claims", "seeds", "base")
    }
    content = [fixed, model.content, cell.content, seed, tests.digest]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


async def measure(
    setting: Setting,
    model: Model,
    trained: Trained,
    seed: int,
    cells: Sequence[Cell],
    tests: TestSet,
    out: Path,
) -> None:
    """Answer all test items under these cells of one model and write their records."""
    settings = load_settings(
        None,
        {
            "pool": trained.pool,
            "base": str(trained.base),
            "device": "cpu",
            "dtype": "float32",
            "quantization": "none",
            "engine": {"max_running": 16, "kv_tokens": 16 * max(1024, 2 * setting.max_tokens)},
        },
    )
    parts = build(settings)
    tokenizer = load_tokenizer(str(trained.base))
    gate = Gate(setting, model, trained, seed, parts.residency.experts)
    await parts.engine.start()
    try:
        for exact in (False, True):
            some = [cell for cell in cells if cell.exact is exact]
            if some:
                await _measured(setting, model, trained, seed, some, tests, out, parts, tokenizer, gate)
    finally:
        await parts.engine.stop(5.0)
        await parts.router.close()


async def _measured(
    setting: Setting,
    model: Model,
    trained: Trained,
    seed: int,
    cells: Sequence[Cell],
    tests: TestSet,
    out: Path,
    parts: Parts,
    tokenizer: Any,
    gate: Gate,
) -> None:
    max_new = setting.max_new if cells[0].exact else 0
    measuring = Measuring(parts, tokenizer, max_tokens=4 * setting.max_tokens, max_new=max_new)
    described = f"{parts.fingerprint} {trained.base} {max_new}"
    ledger_file = out / "ledgers" / f"{model.name}-s{seed}-{max_new}.rows"
    rows: list[Item] = [item for items in tests.rows.values() for item in items]
    questions: list[Item] = [item for items in tests.choices.values() for item in items]
    plans: dict[Cell, dict[str, list[Chosen | None]]] = {}
    asked = {}
    for cell in cells:
        items = [*rows, *(questions if cell.choices else ())]
        plans[cell] = gate.chosen(cell, items)
        for system, chosen in plans[cell].items():
            for item, one in zip(items, chosen, strict=True):
                if one is not None:
                    asked[system, item.id] = (one.mixture, item)
    with Ledger(ledger_file, hashlib.sha256(described.encode()).hexdigest()) as ledger:
        found = await measuring.score(asked, ledger)
    for cell in cells:
        record: dict[str, Any] = {
            "cell": cell.content,
            "seed": seed,
            "identity": identity(setting, model, cell, seed, tests),
            "model": {
                key: value
                for key, value in asdict(trained).items()
                if key in ("steps", "tokens", "parameters", "seconds")
            },
        }
        systems = {}
        for system, chosen in plans[cell].items():
            items = [*rows, *(questions if cell.choices else ())]
            systems[system.partition("/")[2]] = _numbers(tests, cell, items, chosen, found, system, gate)
        record |= {"experts": systems} if cell.gating == "each" else systems[""]
        file = cell_file(out, cell, seed)
        file.parent.mkdir(exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(record))
        partial.replace(file)
        print(f"measured {file.stem}", flush=True)


def _numbers(
    tests: TestSet,
    cell: Cell,
    items: Sequence[Item],
    chosen: Sequence[Chosen | None],
    found: Any,
    system: str,
    gate: Gate,
) -> dict[str, Any]:
    """`rows`: domain -> [nats, tokens, 1 | 0 | null for an exact match] a row. `choices`: benchmark ->
    [acc, acc_norm] a question. `weight`: mean sum of a blend's weights. `right`: share of rows whose first
    expert is that of the cluster they would have been in."""
    numbers: dict[str, Any] = {
        "rows": {
            domain: [_row(found[system, item.id]) for item in group] for domain, group in tests.rows.items()
        }
    }
    if cell.choices:
        numbers["choices"] = {
            name: [_choice(item, found[system, item.id]) for item in group if (system, item.id) in found]
            for name, group in tests.choices.items()
        }
    rows = [one for one, item in zip(chosen, items, strict=True) if not isinstance(item, ChoiceItem)]
    if any(one is not None and one.first is not None for one in rows):
        own = gate.own([item for item in items if not isinstance(item, ChoiceItem)])
        numbers["weight"] = round(sum(one.total for one in rows if one is not None) / len(rows), 4)
        hits = [one is not None and one.first == right for one, right in zip(rows, own, strict=True)]
        numbers["right"] = round(sum(hits) / len(hits), 4)
    return numbers


def _row(score: Score) -> list[float | int | None]:
    return [round(score.nats, 3), score.tokens, None if score.exact is None else int(score.exact)]


def _choice(item: ChoiceItem, score: Score) -> list[int]:
    costs = list(score.choices)
    per_byte = [cost / size for cost, size in zip(costs, item.sizes, strict=True)]
    return [
        int(costs.index(min(costs)) == item.answer),
        int(per_byte.index(min(per_byte)) == item.answer),
    ]
