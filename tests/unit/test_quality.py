"""The experiment of docs/quality.md: its smallest setting runs and goes on; the document has the results."""

import dataclasses
import json
import runpy
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
runpy.run_path(str(ROOT / "benchmarks" / "run.py"))["add_package"]("benchmarks")

from benchmarks.quality import experiment, made  # noqa: E402
from benchmarks.quality.intervals import Results  # noqa: E402
from benchmarks.quality.nf4 import write_nf4  # noqa: E402
from benchmarks.quality.plot import losses_plot  # noqa: E402
from benchmarks.quality.report import (  # noqa: E402
    DOCUMENT,
    RESULTS,
    collect,
    put_tables,
    results_file,
    save,
    tables,
)
from benchmarks.quality.setting import FOLDER, SettingError, load  # noqa: E402
from loramux.server.engine.model import load_base  # noqa: E402
from tests.pool_kit import write_base  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
SETTINGS = sorted(file.stem for file in FOLDER.glob("*.toml"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `tiny`."""
    folder = tmp_path_factory.mktemp("quality")
    assert run(folder)
    return folder


def run(folder: Path) -> bool:
    setting, data = made.put(load("tiny"), folder / "made")
    return experiment.run(setting, data, folder)


def test_every_kind_of_cell_is_measured_and_reported(out: Path, tmp_path: Path) -> None:
    setting = load("tiny")
    content = collect(setting, out)
    assert content["finished"] == content["of"] == len(content["cells"])
    save(content, tmp_path / "found.json")
    results = Results.read(tmp_path / "found.json")
    assert set(results.cells) == {cell.name for cell in setting.cells}
    for cell in results.cells.values():
        for record in cell.records.values():
            for rows in (record.get("experts") or {"": record}).values():
                assert {len(group) for group in rows["rows"].values()} == {setting.rows}
                assert all(
                    nats > 0 and tokens > 0 for group in rows["rows"].values() for nats, tokens, _ in group
                )
    # The full fine-tune learns these words at once; one seed and four rows a topic show it.
    assert results.difference("full", "base").high < 0  # type: ignore[union-attr]
    assert results.cells["moe2 hybrid alpha 1"].mean("weight") < 0.5  # type: ignore[operator]
    assert results.cells["moe4 average"].mean("weight") == pytest.approx(1.0, abs=0.02)
    found = tables(setting, results)
    assert found["losses"].count("\n") == len(setting.cells) + 2
    assert "moe2 hybrid − qlora | 2 |" in found["claims"]
    assert "| base | 1 | 4 |" in found["choices"]
    drawing = ElementTree.fromstring(losses_plot(setting, results))  # noqa: S314
    assert "moe4 arrow" in "".join(drawing.itertext())


def test_a_run_goes_on_where_it_was(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(out / "cells", tmp_path / "before")
    for name in ("moe2_hybrid-s1", "loracoe-s0"):
        (out / "cells" / f"{name}.json").unlink()

    def trained_again(*_: object, **__: object) -> None:
        raise AssertionError("trained twice")

    monkeypatch.setattr("benchmarks.quality.training.build_pool", trained_again)
    monkeypatch.setattr("benchmarks.quality.training.train_mixture", trained_again)
    assert run(out)
    for file in (tmp_path / "before").iterdir():
        assert json.loads(file.read_text()) == json.loads((out / "cells" / file.name).read_text())
    # Another number of test rows makes every cell anew, and no model.
    setting, data = made.put(load("tiny"), out / "made")
    fewer = dataclasses.replace(setting, rows=3, cells=setting.cells[:1])
    assert experiment.run(fewer, data, out)
    assert len(json.loads((out / "cells" / "base-s0.json").read_text())["rows"]["garden"]) == 3


def test_a_base_written_in_nf4_says_what_bitsandbytes_says(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    served = load_base(base, dtype="float32", quantization="nf4", device="cpu")
    assert any(isinstance(module, Linear4bit) for module in served.modules())
    written = write_nf4(base, tmp_path / "nf4")
    plain = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32).eval()
    ids = torch.randint(3, 200, (2, 19))
    with torch.inference_mode():
        found, wanted = plain(ids).logits, served(ids).logits
        exact = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()(ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (found - exact).abs().max() > 0.01


def record(cell: str, seed: int, nats: Any) -> dict[str, Any]:
    """Of two domains, with losses [2, rows] over ten tokens a row."""
    rows = {name: [[float(n), 10, None] for n in group] for name, group in zip("ab", nats, strict=True)}
    return {"cell": {"name": cell}, "seed": seed, "rows": rows}


def test_intervals_cover_a_known_difference_and_pair_rows() -> None:
    draw = np.random.default_rng()
    covered = 0
    for _ in range(40):
        hard = draw.normal(30, 10, size=(2, 40))  # the same rows are hard for both
        cells = [record("a", seed, hard - 2 + draw.normal(0, 2, (2, 40))) for seed in range(3)]
        cells += [record("b", seed, hard + draw.normal(0, 2, (2, 40))) for seed in range(3)]
        found = Results({"cells": cells}).difference("a", "b")
        assert found is not None
        assert found.decides
        assert found.high - found.low < 0.2  # far less than the spread of the rows would give unpaired
        covered += found.low <= -0.2 <= found.high
    assert covered >= 30


def test_an_untrained_base_stands_beside_every_seed() -> None:
    nats = np.full((2, 5), 20.0)
    cells = [record("base", 0, nats), *(record("x", seed, nats - seed) for seed in (1, 2))]
    found = Results({"cells": cells}).difference("x", "base")
    assert found is not None
    assert found.value == pytest.approx(-0.15)
    assert (found.low, found.high) == (pytest.approx(-0.2), pytest.approx(-0.1))
    assert Results({"cells": cells}).difference("x", "y") is None


@pytest.mark.parametrize("name", SETTINGS)
def test_the_document_holds_what_the_results_say(name: str) -> None:
    setting = load(name)
    file = results_file(setting)
    if not file.is_file():
        assert f"<!-- quality:{name}:losses -->" not in DOCUMENT.read_text("utf-8")
        return
    results = Results.read(file)
    text = DOCUMENT.read_text("utf-8")
    assert f"<!-- quality:{name}:claims -->" in text
    assert put_tables(text, setting, results) == text
    assert file.with_suffix(".svg").read_text("utf-8") == losses_plot(setting, results)
    known = {cell.name: cell for cell in setting.cells}
    for one in results.content["cells"]:
        assert one["cell"] == json.loads(json.dumps(known[one["cell"]["name"]].content))


def test_settings_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    text = (FOLDER / "tiny.toml").read_text()
    for before, after, problem in (
        ("rank = 4\n", "rank = 4\nheight = 3\n", "unknown key 'height'"),
        ('a = "moe2 hybrid"', 'a = "moe3 hybrid"', "'moe3 hybrid', which is no cell"),
        ('name = "lora"\n', 'name = "base"\n', "two cells are called 'base'"),
        ('transformer = "bert"\n', "", "needs `transformer`"),
        (
            'model = "loramoe"\ngating = "sparse"',
            'model = "loramoe"\ngating = "hybrid"',
            "does not fit its model",
        ),
    ):
        assert before in text
        (tmp_path / "wrong.toml").write_text(text.replace(before, after, 1))
        with pytest.raises(SettingError, match=problem):
            load(str(tmp_path / "wrong.toml"))
    assert RESULTS.is_dir()
