"""A whole pool from generated rows: built, killed and gone on, checked, damaged, extended."""

import dataclasses
import json
import random
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from loramux.adapters.training import loop
from loramux.adapters.training.base import BaseOptions, train_base
from loramux.adapters.training.expert import ExpertOptions
from loramux.adapters.training.rows import Row, user_text
from loramux.router.fit.embedder import EmbedderOptions
from loramux.router.fit.router import RouterFitOptions
from loramux.router.store import load_router
from loramux.server.cli.pool import app
from loramux.server.pool import build as build_module
from loramux.server.pool import clustering as clustering_module
from loramux.server.pool.add import add_expert
from loramux.server.pool.build import BuildOptions, build_pool
from loramux.server.pool.check import check_pool
from loramux.server.pool.clustering import expert_ids
from loramux.server.pool.manifest import PoolError, read_pool, verify

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

KINDS = {
    "zoo": ("does the lion roar at feeding hour", "the keeper gives meat to the animal"),
    "sea": ("which harbour has the deepest water", "ships anchor where waves are calm"),
    "bread": ("how long must dough rise with yeast", "bake flour in a hot oven"),
}


def rows_of(kind, count, seed=0):
    rng = random.Random(f"{kind}{seed}")
    question, answer = (text.split() for text in KINDS[kind])
    return [
        Row(" ".join(rng.sample(question, 5)) + f" {i}", "", " ".join(rng.sample(answer, 4)))
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rows = [row for kind in KINDS for row in rows_of(kind, 80)]
    random.Random(0).shuffle(rows)
    lines = [json.dumps(dataclasses.asdict(row)) for row in rows]
    (folder / "mixed.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def options(corpus, tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    tiny = BaseOptions(
        vocabulary=300,
        hidden=32,
        layers=1,
        heads=2,
        kv_heads=1,
        ffn=48,
        context=128,
        max_tokens=96,
        step_tokens=512,
        batch_tokens=256,
    )
    train_base([corpus], base, tiny, max_steps=10)
    return BuildOptions(
        base=str(base),
        base_id="tiny",
        name="mini",
        experts=3,
        min_rows=8,
        held_out=0.15,
        device="cpu",
        expert=ExpertOptions(rank=2, alpha=4, rate=1e-2, epochs=3, step_tokens=512, batch_tokens=256),
        embedder=EmbedderOptions(dimension=24, vocab_size=300, batch_size=32, epochs=8),
        router=RouterFitOptions(samples=16),
    )


@pytest.fixture(scope="module")
def built(corpus, options, tmp_path_factory):
    out = tmp_path_factory.mktemp("pools") / "mini"
    return out, build_pool([corpus], out, options)


def test_a_pool_has_one_better_expert_per_cluster_and_finds_it(built):
    out, report = built
    assert check_pool(out) == []
    assert len(report.experts) == 3
    assert report.not_better == []
    assert all(line.expert_loss < line.base_loss - 0.05 for line in report.experts)
    assert report.routed > 0.9
    assert sum(line.rows for line in report.experts) == report.rows
    manifest = read_pool(out).manifest
    assert manifest.base.path == "base"
    assert [entry.rows for entry in manifest.experts] == [line.rows for line in report.experts]
    words = {word for question, answer in KINDS.values() for word in (question + " " + answer).split()}
    assert all(set(entry.id.split("-")) <= words for entry in manifest.experts)
    router = load_router(out / "router", experts=[entry.id for entry in manifest.experts])
    firsts = {}
    for kind in KINDS:
        chosen = [d.candidates[0].id for d in router.decide([r.instruction for r in rows_of(kind, 10, 1)])]
        firsts[kind] = max(set(chosen), key=chosen.count)
        assert chosen.count(firsts[kind]) >= 9
    assert len(set(firsts.values())) == 3


def test_no_file_of_a_pool_tells_where_it_was_built(built, options):
    out, _ = built
    for file in out.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            for place in (str(out), str(out.parent), options.base):
                assert place.encode() not in data, file


def test_a_killed_build_repeats_nothing_that_was_done(built, corpus, options, tmp_path, monkeypatch):
    whole, expected = built
    out = tmp_path / "mini"
    real_train, started = build_module.train_expert, []

    def die_at_the_third(*arguments, **keywords):
        started.append(keywords["label"])
        if len(started) == 3:
            raise KeyboardInterrupt
        return real_train(*arguments, **keywords)

    monkeypatch.setattr(build_module, "train_expert", die_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        build_pool([corpus], out, options)
    assert not out.exists()
    assert len(list((tmp_path / "mini.work/experts").glob("*/adapter_model.safetensors"))) == 2
    monkeypatch.setattr(build_module, "train_expert", real_train)
    steps = []
    real_step = loop._step
    monkeypatch.setattr(loop, "_step", lambda *a: steps.append(1) or real_step(*a))
    for name in ("train_embedder", "kmeans", "top_terms"):
        monkeypatch.setattr(f"loramux.server.pool.clustering.{name}", lambda *a, **k: pytest.fail("repeated"))
    report = build_pool([corpus], out, options)
    assert report == expected
    assert len(steps) == expected.experts[2].steps
    mine, theirs = read_pool(out).manifest, read_pool(whole).manifest
    assert mine == theirs


def test_too_few_rows_are_known_before_anything_is_loaded(corpus, options, tmp_path):
    asked = dataclasses.replace(options, experts=12, min_rows=32, base="/absent")
    with pytest.raises(PoolError, match=r"cannot fill 12 clusters of at least 32; .*--experts.*--min-rows"):
        build_pool([corpus], tmp_path / "out", asked)


def test_a_folder_that_is_no_pool_is_left_alone(corpus, options, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(PoolError, match="is no pool"):
        build_pool([corpus], tmp_path, options)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@pytest.fixture
def copy(built, tmp_path):
    return shutil.copytree(built[0], tmp_path / "copy")


def test_check_names_what_is_broken(copy):
    run = CliRunner()
    assert run.invoke(app, ["check", str(copy)]).output.strip() == f"{copy}: sound"
    first = read_pool(copy).manifest.experts[0].id
    weights = copy / "experts" / first / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (copy / "router/router.safetensors").unlink()
    result = run.invoke(app, ["check", str(copy)])
    assert result.exit_code == 1
    assert f"experts/{first}/adapter_model.safetensors: changed" in result.output
    assert f"expert {first}: " in result.output
    assert "router/router.safetensors: missing" in result.output
    assert "router: " in result.output


def test_someones_lora_can_be_added_and_is_routed_to(copy, options, tmp_path):
    from loramux.adapters.training.expert import train_expert
    from loramux.server.pool.training_base import load_training_base

    rng = random.Random(4)
    words = ["planet", "comet", "orbit", "telescope", "galaxy"]
    sky = [Row(" ".join(rng.sample(words, 4)) + f" {i}", "", "stars") for i in range(30)]
    model, tokenizer = load_training_base(options.base)
    train_expert(model, tokenizer, sky, [], tmp_path / "sky", options.expert, base_id="tiny")
    before = read_pool(copy).manifest
    add_expert(copy, tmp_path / "sky", id="sky", texts=[user_text(row) for row in sky], description="Stars")
    manifest = read_pool(copy).manifest
    assert check_pool(copy) == []
    assert manifest.experts[:-1] == before.experts
    assert (manifest.experts[-1].id, manifest.experts[-1].rows) == ("sky", 30)
    assert not (copy / before.router.path).exists()
    router = load_router(copy / manifest.router.path, experts=[e.id for e in manifest.experts])
    assert [d.candidates[0].id for d in router.decide(["comet orbit galaxy", "telescope planet"])] == [
        "sky"
    ] * 2
    for kind in KINDS:
        chosen = [d.candidates[0].id for d in router.decide([r.instruction for r in rows_of(kind, 10, 2)])]
        assert "sky" not in chosen
    with pytest.raises(PoolError, match="used in this pool already"):
        add_expert(copy, tmp_path / "sky", id="sky", texts=[user_text(row) for row in sky])


def test_what_cannot_be_added_is_refused_and_the_pool_stays_as_it_was(copy, built, tmp_path):
    from loramux.adapters.errors import AdapterError, BaseMismatchError

    source = next((built[0] / "experts").iterdir())
    texts = [row.instruction for row in rows_of("zoo", 5)]
    for id in ("Big Cats", "auto", "tiny"):
        with pytest.raises(PoolError, match="expert id"):
            add_expert(copy, source, id=id, texts=texts)
    with pytest.raises(PoolError, match="too few"):
        add_expert(copy, source, id="new", texts=texts[:1])
    foreign = shutil.copytree(source, tmp_path / "foreign")
    config = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "big"}))
    with pytest.raises(BaseMismatchError, match="big"):
        add_expert(copy, foreign, id="new", texts=texts)
    (foreign / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(AdapterError, match="use_dora"):
        add_expert(copy, foreign, id="new", texts=texts)
    assert verify(copy) == []
    assert read_pool(copy).manifest == read_pool(built[0]).manifest
    (copy / "report.json").write_text("{}")
    with pytest.raises(PoolError, match=r"report\.json: changed"):
        add_expert(copy, source, id="new", texts=texts)


@pytest.mark.parametrize("held_out", ["0.1", "0"])
def test_the_command_builds_a_pool(corpus, options, tmp_path, held_out):
    arguments = ["build", "--data", str(corpus), "--out", str(tmp_path / "p"), "--base", options.base]
    arguments += ["--experts", "2", "--min-rows", "8", "--epochs", "0.2", "--rank", "1", "--no-copy-base"]
    arguments += ["--encoder", "static"]
    result = CliRunner().invoke(
        app, [*arguments, "--held-out", held_out, "--base-id", "b"], env={"COLUMNS": "160"}
    )
    assert result.exit_code == 0, result.output
    assert "top terms" in result.output
    assert read_pool(tmp_path / "p").manifest.base.path == options.base
    assert check_pool(tmp_path / "p") == []


def test_ids_are_distinct_slugs():
    terms = [["select", "where", "table"], ["Select", "where"], ["größe", "l'eau"], [], ["日本"]]
    assert expert_ids(terms) == ["select-where", "select-where-2", "groe-leau", "cluster", "cluster-2"]


def test_a_cluster_is_named_after_its_domain_where_it_has_one_to_itself():
    terms = [["card", "cash"], ["select", "where"], ["count", "team"], ["court", "law"], ["a", "b"]]
    domains = ["Banking intent", "sql", "sql", "", "banking-intent-2"]
    assert expert_ids(terms, domains) == [
        "banking-intent", "select-where", "count-team", "court-law", "banking-intent-2",
    ]  # fmt: skip
    rows = [Row("x", "", "y", domain) for domain in ("a", "a", "b", "b", "b", "", "", "c")]
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    assert clustering_module._domains(rows, labels, 3) == ["a", "b", ""]
