"""`loramux router fit`: another router for the same experts, from labelled rows and from unlabelled ones."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertModel
from typer.testing import CliRunner

from loramux.router.decision import RoutingOptions
from loramux.router.errors import RouterError
from loramux.router.fit.router import RouterFitOptions
from loramux.router.router import Router
from loramux.router.store import load_router
from loramux.server.cli.router import app
from loramux.server.pool.add import remove_expert
from loramux.server.pool.check import check_pool
from loramux.server.pool.manifest import PoolError, read_pool
from loramux.server.pool.new import NewExpert, NewOptions, new_pool
from loramux.server.pool.refit import RefitOptions, refit
from tests.pool_kit import BASE, topic_texts, write_adapter, write_base, write_encoder
from tests.unit.router.bert import config, wordpiece

TOPICS = ("kitchen", "harbour", "garden")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pool/ of three experts made from three texts each; rows/, foreign.jsonl and bert/."""
    root = tmp_path_factory.mktemp("refit")
    write_base(root / "base")
    write_encoder(root / "encoder")
    experts = [
        NewExpert(topic, write_adapter(root / topic, topic, rank), topic_texts(topic, 3))
        for rank, topic in enumerate(TOPICS, 2)
    ]
    options = NewOptions(str(root / "base"), BASE, copy_base=False, encoder=str(root / "encoder"))
    new_pool(root / "pool", experts, options)
    (root / "rows").mkdir()
    for topic in TOPICS:
        write_rows(root / "rows" / f"{topic}.train.jsonl", topic_texts(topic, 40, seed=5))
    write_rows(root / "foreign.jsonl", topic_texts("orchestra", 40, seed=5))
    torch.manual_seed(1)
    BertModel(config(layers=1, hidden=48)).save_pretrained(root / "bert")
    wordpiece().save_pretrained(root / "bert")
    return root


def write_rows(file: Path, texts: list[str], **more: str) -> None:
    rows = [json.dumps({"instruction": text, "output": "", **more}) for text in texts]
    file.write_text("\n".join(rows) + "\n")


@pytest.fixture
def pool(parts: Path, tmp_path: Path) -> Path:
    shutil.copytree(parts / "pool", tmp_path / "pool")
    return tmp_path / "pool"


def router_of(pool: Path) -> Router:
    return load_router(read_pool(pool).router_dir)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["fit", *arguments], env={"COLUMNS": "160"})
    return result.exit_code, result.output if result.exception is None else str(result.exception)


def right(router: Router, strategy: str = "hybrid") -> float:
    options = RoutingOptions(strategy=strategy, threshold=-1.0)  # type: ignore[arg-type]
    hits = [
        decision.candidates[0].id == topic
        for topic in TOPICS
        for decision in router.decide(topic_texts(topic, 30, seed=9), options)
    ]
    return sum(hits) / len(hits)


def test_the_command_replaces_the_router_and_nothing_else(parts: Path, pool: Path, tmp_path: Path) -> None:
    before, old = read_pool(pool), router_of(pool)
    code, output = run(
        str(pool), "--data", str(parts / "rows"), "--foreign", str(parts / "foreign.jsonl"),
        "--false-routing", "0.1", "--out", str(tmp_path / "figures.json"),
    )  # fmt: skip
    assert code == 0, output
    assert check_pool(pool) == []
    after, new = read_pool(pool), router_of(pool)
    assert after.manifest.experts == before.manifest.experts
    assert after.router_dir.name != before.router_dir.name
    assert not before.router_dir.exists()
    kept = {name: value for name, value in after.manifest.files.items() if not name.startswith("router")}
    assert kept.items() <= before.manifest.files.items()
    assert right(new) > max(0.95, right(old) - 0.01)
    report = json.loads((tmp_path / "figures.json").read_text())
    assert set(report["candidates"]) == {"discriminant", "ridge", "logistic"}
    best = min(report["candidates"], key=lambda name: report["candidates"][name][1]["nll"])
    assert report["classifier"] == best
    assert report["rows"] == dict.fromkeys(TOPICS, 40)
    assert report["foreign"] == 40
    assert new.state.hybrid_weight == report["hybrid_weight"]
    for line in report["candidates"][best]:
        options = RoutingOptions(strategy=line["strategy"])
        texts = topic_texts("orchestra", 40, seed=5)
        routed = np.mean([not one.fallback for one in new.decide(texts, options)])
        assert routed == pytest.approx(line["false_routing"], abs=0.026)
        assert routed <= 0.126
        assert f"{line['accuracy']:.1%}" in output


def test_rows_without_labels_get_them_from_the_router_as_it_is(
    parts: Path, pool: Path, tmp_path: Path
) -> None:
    strict = RouterFitOptions(false_routing=0.1)
    refit(pool, [parts / "rows"], RefitOptions(fit=strict), [parts / "foreign.jsonl"])
    before = router_of(pool)
    texts = [text for topic in (*TOPICS, "orchestra") for text in topic_texts(topic, 40, seed=11)]
    write_rows(tmp_path / "mixed.jsonl", texts)
    report = refit(pool, [tmp_path / "mixed.jsonl"], RefitOptions(labels="routed"))
    decisions = before.decide(texts)
    assert report.skipped == sum(one.fallback for one in decisions) > 25
    for topic in TOPICS:
        assert report.rows[topic] == sum(one.experts[0].id == topic for one in decisions if one.experts)
    assert right(router_of(pool)) > 0.9
    assert check_pool(pool) == []


def test_a_fine_tuned_classifier_comes_and_goes(parts: Path, pool: Path) -> None:
    rows = ["--data", str(parts / "rows")]
    tuned = ["--classifier", "transformer", "--transformer", str(parts / "bert"), "--rate", "2e-3"]
    tuned += ["--epochs", "12"]
    code, output = run(str(pool), *rows, *tuned)
    assert code == 0, output
    assert check_pool(pool) == []
    router = router_of(pool)
    assert router.classifier is not None
    assert router.classifier.kind == "transformer"
    assert right(router, "classifier") > 0.8
    with pytest.raises(PoolError, match="fine-tuned"):
        remove_expert(pool, "garden")
    # The classifier of the pool may itself be fitted again, and replaced by a head that takes experts.
    assert run(str(pool), *rows, *tuned, "--epochs", "0.1")[0] == 0
    assert run(str(pool), *rows, "--classifier", "discriminant")[0] == 0
    assert check_pool(pool) == []
    assert not (read_pool(pool).router_dir / "classifier").exists()
    remove_expert(pool, "garden")
    assert router_of(pool).experts == ("kitchen", "harbour")


def test_domains_may_be_mapped_and_foreign_ones_are_passed_over(
    parts: Path, pool: Path, tmp_path: Path
) -> None:
    shutil.copytree(parts / "rows", tmp_path / "rows")
    shutil.copy(parts / "foreign.jsonl", tmp_path / "rows" / "orchestra.train.jsonl")
    write_rows(tmp_path / "rows" / "kitchen.train.jsonl", topic_texts("kitchen", 20), domain="cooking")
    code, output = run(str(pool), "--data", str(tmp_path / "rows"), "--expert-of", "cooking=kitchen")
    assert code == 0, output
    assert "fitted on 100 rows, 40 rows are for no expert" in output


def test_what_cannot_be_fitted_leaves_the_pool_as_it_was(parts: Path, pool: Path, tmp_path: Path) -> None:
    before = read_pool(pool).manifest
    few = tmp_path / "kitchen.jsonl"
    write_rows(few, topic_texts("kitchen", 5))
    with pytest.raises(PoolError, match="harbour, garden: fewer than 2 rows"):
        refit(pool, [few], RefitOptions())
    with pytest.raises(PoolError, match="no row belongs to an expert"):
        refit(pool, [parts / "foreign.jsonl"], RefitOptions())
    with pytest.raises(PoolError, match="needs --transformer"):
        refit(pool, [parts / "rows"], RefitOptions(classifier="transformer"))
    with pytest.raises(RouterError, match="nothing to fine-tune"):
        refit(pool, [parts / "rows"], RefitOptions(classifier="transformer", encoder=str(parts / "encoder")))
    for wrong in (["--classifier", "svm"], ["--labels", "x"], ["--hybrid-weight", "2"], ["--expert-of", "x"]):
        assert run(str(pool), "--data", str(parts / "rows"), *wrong)[0] == 2
    assert read_pool(pool).manifest == before
    assert check_pool(pool) == []
    (pool / read_pool(pool).manifest.router.path / "router.json").write_text("{}")
    with pytest.raises(PoolError, match="mend the pool first"):
        refit(pool, [parts / "rows"], RefitOptions())
