"""The results of a setting as one JSON file, and the tables of docs/quality.md, made from it alone."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality.intervals import Measured, Results, paired
from benchmarks.quality.measure import cell_file
from benchmarks.quality.setting import Setting

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "quality.md"
BASES = {"plain": "base", "nf4": "base nf4"}


def results_file(setting: Setting) -> Path:
    """Where a setting's records are committed."""
    return RESULTS / f"quality-{setting.name}.json"


def collect(setting: Setting, out: Path) -> dict[str, Any]:
    """What is finished of a run, in the order of the setting."""
    records = []
    for cell in setting.cells:
        for seed in setting.seeds_of(cell):
            file = cell_file(out, cell, seed)
            if file.is_file():
                records.append(json.loads(file.read_text()))
    wanted = sum(len(setting.seeds_of(cell)) for cell in setting.cells)
    return {
        "setting": setting.name,
        "about": setting.about,
        "tokens": setting.tokens,
        "rows": setting.rows,
        "finished": len(records),
        "of": wanted,
        "cells": records,
    }


def save(content: Mapping[str, Any], file: Path) -> None:
    """One record a line, so that a difference can be read."""
    head = {key: value for key, value in content.items() if key != "cells"}
    lines = ",\n".join(json.dumps(record, separators=(",", ":")) for record in content["cells"])
    file.write_text(f'{json.dumps(head)[:-1]}, "cells": [\n{lines}\n]}}\n', encoding="utf-8")


def tables(setting: Setting, results: Results) -> dict[str, str]:
    """Every table by name."""
    found = {
        "state": _state(setting, results),
        "losses": "\n".join(_losses(setting, results)),
        "claims": "\n".join(_claims(setting, results)),
    }
    if any(cell.choice(None, 0) for cell in results.cells.values()):
        found["choices"] = "\n".join(_choices(results))
    return found


def put_tables(text: str, setting: Setting, results: Results) -> str:
    """A document whose places from `<!-- quality:<setting>:<table> -->` to `<!-- end -->` hold the tables."""
    for name, table in tables(setting, results).items():
        begin, end = f"<!-- quality:{setting.name}:{name} -->", "<!-- end -->"
        if begin not in text:
            continue
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return text


def _state(setting: Setting, results: Results) -> str:
    seconds = sum(
        {
            (setting.model(record["cell"]["model"]).name, record["seed"]): record["model"]["seconds"]
            for record in results.content["cells"]
        }.values()
    )
    rows = sum(map(len, next(iter(results.content["cells"]))["rows"].values()))
    return (
        f"{results.content['finished']} of {results.content['of']} cells are measured, on {rows} rows; "
        f"training took {seconds / 60:.0f} minutes of one core."
    )


def _losses(setting: Setting, results: Results) -> Iterator[str]:
    yield (
        "| row | seeds | trained | tokens | Σ weight | own expert | loss | less the base's "
        "| of the oracle's gain | of full tuning's | exact match |\n" + 11 * "|---" + "|"
    )
    for cell in setting.cells:
        if (found := results.cells.get(cell.name)) is None:
            continue
        if cell.gating == "each":
            best = results.best_expert(cell.name)
            assert best is not None
            for what, loss in zip(("domain", "row"), best, strict=True):
                name = f"{cell.name.removesuffix(' each')}: best of each {what}"
                yield f"| {name} | {len(found.seeds)} | | | | | {loss:.3f} | | | | |"
            continue
        untrained = cell.gating == "base" and setting.model(cell.model).kind != "full"
        model_base = setting.model(cell.model).base
        base = None if untrained else results.difference(cell.name, BASES[model_base])
        model = found.any["model"]
        yield " | ".join(
            [
                f"| {cell.name}",
                str(len(found.seeds)),
                "" if untrained else _count(model["parameters"]),
                "" if untrained else f"{_mean_tokens(found):,.0f}",
                _number(found.mean("weight"), ".2f"),
                _number(found.mean("right"), ".0%"),
                f"{found.loss():.3f}",
                "" if base is None else f"{base.value:+.3f} [{base.low:+.3f}, {base.high:+.3f}]",
                _number(results.gain_share(cell.name, f"{cell.model} oracle", BASES[model_base]), ".0%"),
                "" if untrained else _number(results.gain_share(cell.name, "full", "base"), ".0%"),
                _exact(found) + " |",
            ]
        )


def _claims(setting: Setting, results: Results) -> Iterator[str]:
    yield "| from | claim | rows compared | seeds | difference in loss | here |\n|---|---|---|---|---|---|"
    for claim in setting.claims:
        found = results.difference(claim.a, claim.b)
        numbers = seeds = ""
        verdict = "not measured yet"
        if found is not None:
            numbers = f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
            seeds = str(len(paired(results.cells[claim.a], results.cells[claim.b])))
            verdict = "holds" if found.value < 0 else "does not hold"
            if not found.decides:
                verdict = "cannot be decided"
        yield f"| {claim.source} | {claim.says} | {claim.a} − {claim.b} | {seeds} | {numbers} | {verdict} |"


def _choices(results: Results) -> Iterator[str]:
    asked = {name: cell for name, cell in results.cells.items() if cell.choice(None, 0)}
    benchmarks = sorted(next(iter(asked.values())).any["choices"])
    yield f"| row | seeds | questions | {' | '.join(benchmarks)} | mean |"
    yield "|---|---|---|" + "---|" * (len(benchmarks) + 1)
    for name, cell in asked.items():
        whole = cell.choice(None, 0)
        assert whole is not None
        cells = [_shares(cell, benchmark) for benchmark in [*benchmarks, None]]
        yield f"| {name} | {len(cell.seeds)} | {whole[1]} | {' | '.join(cells)} |"


def _shares(cell: Measured, benchmark: str | None) -> str:
    acc, normed = cell.choice(benchmark, 0), cell.choice(benchmark, 1)
    return "" if acc is None or normed is None else f"{acc[0]:.3f} / {normed[0]:.3f}"


def _mean_tokens(cell: Measured) -> float:
    return sum(cell.records[seed]["model"]["tokens"] for seed in cell.seeds) / len(cell.seeds)


def _exact(cell: Measured) -> str:
    found = cell.exact()
    return "" if found is None else f"{found[0]:.1%} of {found[1]}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} M" if parameters >= 1e5 else f"{parameters / 1e3:.0f} k"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
