"""Measuring the cells of one trained model through the serving engine; each leaves a record."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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

#: Scores by system and item.
Found = Mapping[tuple[str, str], Score]


def cell_file(out: Path, cell: Cell, seed: int) -> Path:
    """Where the record of a cell lies."""
    return out / "cells" / f"{cell.name.replace(' ', '_').replace('/', '-')}-s{seed}.json"


@dataclass(frozen=True, slots=True)
class Trial:
    """One model trained with one seed, measured on test items; `out` is where its records go."""

    setting: Setting
    model: Model
    seed: int
    tests: TestSet
    out: Path

    def identity(self, cell: Cell) -> str:
        """Stands for everything that a cell's numbers depend on."""
        fixed = {
            key: value
            for key, value in asdict(self.setting).items()
            if key not in ("name", "about", "models", "cells", "claims", "seeds", "base")
        }
        content = [fixed, self.model.content, cell.content, self.seed, self.tests.digest]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def is_done(self, cell: Cell) -> bool:
        """Whether a cell's record is there, made with these very inputs."""
        try:
            record = json.loads(cell_file(self.out, cell, self.seed).read_text())
        except (OSError, ValueError):
            return False
        return bool(record["identity"] == self.identity(cell))

    def items(self, cell: Cell) -> list[Item]:
        """What a cell answers: every row, and the questions with choices where it is asked for them."""
        groups = [*self.tests.rows.values(), *(self.tests.choices.values() if cell.choices else ())]
        return [item for items in groups for item in items]


async def measure(trial: Trial, trained: Trained, cells: Sequence[Cell]) -> None:
    """Answer all test items under these cells of one model and write their records."""
    settings = load_settings(
        None,
        {
            "pool": trained.pool,
            "base": str(trained.base),
            "device": "cpu",
            "dtype": "float32",
            "quantization": "none",
            "engine": {"max_running": 16, "kv_tokens": 16 * max(1024, 2 * trial.setting.max_tokens)},
        },
    )
    parts = build(settings)
    gate = Gate(trial.setting, trial.model, trained, trial.seed, parts.residency.experts)
    bench = _Bench(trial, trained, parts, load_tokenizer(str(trained.base)), gate)
    await parts.engine.start()
    try:
        for exact in (False, True):
            some = [cell for cell in cells if cell.exact is exact]
            if some:
                await bench.measure(some, trial.setting.max_new if exact else 0)
    finally:
        await parts.engine.stop(5.0)
        await parts.router.close()


@dataclass(frozen=True, slots=True)
class _Bench:
    """A trial whose model is served by an engine that runs."""

    trial: Trial
    trained: Trained
    parts: Parts
    tokenizer: Any
    gate: Gate

    async def measure(self, cells: Sequence[Cell], max_new: int) -> None:
        """`max_new`: as `Measuring` has it."""
        trial = self.trial
        max_tokens = 4 * trial.setting.max_tokens
        measuring = Measuring(self.parts, self.tokenizer, max_tokens=max_tokens, max_new=max_new)
        described = f"{self.parts.fingerprint} {self.trained.base} {max_new}"
        ledger_file = trial.out / "ledgers" / f"{trial.model.name}-s{trial.seed}-{max_new}.rows"
        plans = {cell: self.gate.chosen(cell, trial.items(cell)) for cell in cells}
        asked = {
            (system, item.id): (one.mixture, item)
            for cell, plan in plans.items()
            for system, chosen in plan.items()
            for item, one in zip(trial.items(cell), chosen, strict=True)
            if one is not None
        }
        with Ledger(ledger_file, hashlib.sha256(described.encode()).hexdigest()) as ledger:
            found = await measuring.score(asked, ledger)
        for cell, plan in plans.items():
            self._record(cell, plan, found)

    def _record(self, cell: Cell, plan: Mapping[str, Sequence[Chosen | None]], found: Found) -> None:
        """Write what a cell's systems answered."""
        trial = self.trial
        record: dict[str, Any] = {
            "cell": cell.content,
            "seed": trial.seed,
            "identity": trial.identity(cell),
            "model": {
                key: value
                for key, value in asdict(self.trained).items()
                if key in ("steps", "tokens", "parameters", "seconds")
            },
        }
        systems = {
            system.partition("/")[2]: self._numbers(cell, system, chosen, found)
            for system, chosen in plan.items()
        }
        record |= {"experts": systems} if cell.gating == "each" else systems[""]
        file = cell_file(trial.out, cell, trial.seed)
        file.parent.mkdir(exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(record))
        partial.replace(file)
        print(f"measured {file.stem}", flush=True)

    def _numbers(
        self, cell: Cell, system: str, chosen: Sequence[Chosen | None], found: Found
    ) -> dict[str, Any]:
        """`rows`: domain -> [nats, tokens, 1 | 0 | null for an exact match] a row. `choices`: benchmark ->
        [acc, acc_norm] a question. `weight`: mean sum of a blend's weights. `right`: share of rows whose
        first expert is that of the cluster they would have been in."""
        tests, items = self.trial.tests, self.trial.items(cell)
        numbers: dict[str, Any] = {
            "rows": {
                domain: [_row(found[system, item.id]) for item in group]
                for domain, group in tests.rows.items()
            }
        }
        if cell.choices:
            numbers["choices"] = {
                name: [_choice(item, found[system, item.id]) for item in group if (system, item.id) in found]
                for name, group in tests.choices.items()
            }
        rows = [one for one, item in zip(chosen, items, strict=True) if not isinstance(item, ChoiceItem)]
        if any(one is not None and one.first is not None for one in rows):
            own = self.gate.own([item for item in items if not isinstance(item, ChoiceItem)])
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
