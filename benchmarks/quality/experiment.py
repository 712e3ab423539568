"""The experiment of docs/quality.md, from a committed setting: what is done is on disk and is not done twice.

    python benchmarks/quality/run.py small --data DIR --out DIR

`--data` holds `corpus/<domain>.train.jsonl`, `corpus/<domain>.test.jsonl` and, for settings with choices,
`benchmarks/*.jsonl`. Killed, the same command goes on. `--save` writes what is finished to benchmarks/results
and `--tables` puts the tables made from there into docs/quality.md; neither needs the data.
"""

import argparse
import asyncio
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from benchmarks.quality import made
from benchmarks.quality.intervals import Results
from benchmarks.quality.measure import Trial, measure
from benchmarks.quality.plot import losses_plot
from benchmarks.quality.report import DOCUMENT, collect, put_tables, results_file, save
from benchmarks.quality.setting import Cell, Model, Setting, load
from benchmarks.quality.texts import test_set
from benchmarks.quality.training import Trainer


def run(setting: Setting, data: Path, out: Path, *, minutes: float | None = None) -> bool:
    """Train and measure whatever is not there yet; whether everything is.

    Phase by phase, seed by seed, models in the order of the setting: what is finished first is
    comparable.
    """
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(setting, data, out)
    tests = test_set(setting, data, trainer.tokenizer())
    started = time.monotonic()
    for seed, model, cells in _work(setting):
        trial = Trial(setting, model, seed, tests, out)
        missing = [cell for cell in cells if not trial.is_done(cell)]
        if not missing:
            continue
        if minutes is not None and time.monotonic() - started > 60 * minutes:
            return False
        asyncio.run(measure(trial, trainer.trained(model, seed), missing))
    return True


def _work(setting: Setting) -> Iterator[tuple[int, Model, list[Cell]]]:
    seeds = sorted({seed for cell in setting.cells for seed in setting.seeds_of(cell)})
    for phase in sorted({cell.phase for cell in setting.cells}):
        for seed, model in product(seeds, setting.models):
            cells = [
                cell
                for cell in setting.cells
                if cell.phase == phase and cell.model == model.name and seed in setting.seeds_of(cell)
            ]
            if cells:
                yield seed, model, cells


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/quality/run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("setting", help="tiny, small, smollm2, or a TOML file of your own")
    parser.add_argument("--data", type=Path, help="texts; without, nothing is trained or measured")
    parser.add_argument("--out", type=Path, help="the folder that holds what is done")
    parser.add_argument("--base", help="in place of the setting's: a folder, a GGUF file, a package")
    parser.add_argument("--threads", type=int, default=1, help="of torch; default 1")
    parser.add_argument("--minutes", type=float, help="begin no further model after these")
    parser.add_argument("--save", action="store_true", help="what is finished goes to benchmarks/results")
    parser.add_argument("--tables", action="store_true", help="docs/quality.md and the plot, from there")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(arguments.threads)
    setting = load(arguments.setting)
    if arguments.base is not None:
        setting = replace(setting, base=arguments.base)
    if arguments.out is not None and (arguments.data is not None or setting.made):
        data = arguments.data
        if setting.made:
            setting, data = made.put(setting, arguments.out / "made")
        complete = run(setting, data, arguments.out, minutes=arguments.minutes)
        print("everything is measured" if complete else "there is more to do; run it again")
    if arguments.save:
        if arguments.out is None:
            parser.error("--save: --out names the folder of the run")
        save(collect(setting, arguments.out), results_file(setting))
    if arguments.tables:
        results = Results.read(results_file(setting))
        DOCUMENT.write_text(put_tables(DOCUMENT.read_text("utf-8"), setting, results), "utf-8")
        results_file(setting).with_suffix(".svg").write_text(losses_plot(setting, results), "utf-8")
