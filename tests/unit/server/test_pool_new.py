"""A pool of adapters that exist: made from ten texts each, checked, shown, grown and shrunk."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loramux.router.decision import RoutingOptions
from loramux.router.store import load_router
from loramux.server.cli.pool import app
from loramux.server.pool.check import check_pool
from loramux.server.pool.manifest import read_pool
from tests.pool_kit import BASE, installed, topic_texts, write_adapter, write_base, write_encoder

FIRST = ("kitchen", "harbour", "garden")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, encoder/, adapters/<topic>, and texts of each topic, some as rows and some as lines."""
    root = tmp_path_factory.mktemp("parts")
    write_base(root / "base")
    write_encoder(root / "encoder")
    for rank, topic in enumerate((*FIRST, "orchestra"), 2):
        write_adapter(root / "adapters" / topic, topic, rank)
        texts = topic_texts(topic, 10)
        if topic == "garden":
            (root / "garden.txt").write_text("\n".join(texts) + "\n\n")
        else:
            rows = [json.dumps({"instruction": text, "output": "yes"}) for text in texts]
            (root / f"{topic}.jsonl").write_text("\n".join(rows))
    return root


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    return result.exit_code, result.output if result.exception is None else str(result.exception)


def making(parts: Path, out: Path, *more: str, topics: tuple[str, ...] = FIRST) -> list[str]:
    arguments = ["new", "--out", str(out), "--base", str(parts / "base"), "--base-id", BASE]
    if "--encoder" not in more:
        arguments += ["--encoder", str(parts / "encoder")]
    for topic in topics:
        file = f"{topic}.txt" if topic == "garden" else f"{topic}.jsonl"
        arguments += ["--expert", f"{topic}={parts}/adapters/{topic}:{parts}/{file}"]
    return [*arguments, *more]


@pytest.fixture(scope="module")
def made(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pools") / "mine"
    code, output = run(*making(parts, out))
    assert code == 0, output
    assert "garden: 10 examples, 100% of them are routed to it first" in output
    return out


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def first_choices(pool: Path, topic: str) -> list[str]:
    """Whatever the threshold, over texts that were not among the examples."""
    manifest = read_pool(pool).manifest
    router = load_router(pool / manifest.router.path, experts=[entry.id for entry in manifest.experts])
    decisions = router.decide(topic_texts(topic, 20, seed=9), RoutingOptions(threshold=-1.0))
    return [decision.candidates[0].id for decision in decisions]


def test_ten_texts_each_make_a_sound_pool_that_finds_its_experts(made: Path) -> None:
    assert check_pool(made) == []
    manifest = read_pool(made).manifest
    assert [(entry.id, entry.rows) for entry in manifest.experts] == [(topic, 10) for topic in FIRST]
    assert (manifest.name, manifest.base.path) == ("mine", "base")
    for topic in FIRST:
        assert first_choices(made, topic).count(topic) >= 14
    assert not made.with_name("mine.partial").exists()


def test_it_grows_and_shrinks(copy: Path, parts: Path) -> None:
    arguments = ["add", str(copy), str(parts / "adapters/orchestra"), "--id", "orchestra"]
    assert run(*arguments, "--data", str(parts / "orchestra.jsonl"))[0] == 0
    assert check_pool(copy) == []
    assert first_choices(copy, "orchestra").count("orchestra") >= 14
    code, output = run("remove", str(copy), "--id", "harbour")
    assert (code, output.strip()) == (0, f"{copy}: harbour removed")
    assert check_pool(copy) == []
    assert not (copy / "experts/harbour").exists()
    assert [entry.id for entry in read_pool(copy).manifest.experts] == ["kitchen", "garden", "orchestra"]
    assert first_choices(copy, "orchestra").count("orchestra") >= 14
    assert "harbour" not in first_choices(copy, "harbour")


def test_what_cannot_be_removed_is_refused(copy: Path) -> None:
    assert (
        "no expert 'attic'; it has kitchen, harbour, garden" in run("remove", str(copy), "--id", "attic")[1]
    )
    for topic in FIRST[:2]:
        assert run("remove", str(copy), "--id", topic)[0] == 0
    assert "garden is the last expert" in run("remove", str(copy), "--id", "garden")[1]
    assert check_pool(copy) == []


def test_show_names_base_encoder_and_experts(made: Path) -> None:
    code, output = run("show", str(made))
    assert code == 0
    for part in (
        "pool mine: 3 experts",
        "base tiny: base",
        "in the pool, 48 dimensions",
        "kitchen",
        "hybrid:",
    ):
        assert part in output


def test_a_packaged_encoder_is_named_in_the_pool_not_copied(parts: Path, tmp_path: Path) -> None:
    with installed(tmp_path / "site", "topic_words", "topic-words", "2.0") as package:
        shutil.copytree(parts / "encoder", package / "model")
        code, output = run(*making(parts, tmp_path / "p", "--encoder", "topic_words"))
        assert code == 0, output
        assert check_pool(tmp_path / "p") == []
        assert "topic_words of topic-words==2.0" in run("show", str(tmp_path / "p"))[1]
    assert not (tmp_path / "p/router/encoder").exists()
    [problem] = check_pool(tmp_path / "p")
    assert "topic_words is not installed; pip install topic-words==2.0" in problem


def test_one_expert_is_a_pool(parts: Path, tmp_path: Path) -> None:
    code, output = run(*making(parts, tmp_path / "p", topics=("harbour",)))
    assert code == 0, output
    assert check_pool(tmp_path / "p") == []


@pytest.mark.parametrize(
    ("expert", "why"),
    [
        ("poetry", "give ID=PATH:ROWS"),
        ("poetry=only-a-path", "give ID=PATH:ROWS"),
        ("poetry={parts}/nowhere:{parts}/garden.txt", "nowhere is no directory"),
        ("poetry={parts}/adapters/garden:{parts}/nothing.jsonl", "nothing.jsonl: no such file or folder"),
        ("poetry={parts}/adapters/garden:{parts}/nothing.txt", "nothing.txt: no such file or folder"),
        ("poetry={parts}/encoder:{parts}/garden.txt", "adapter_config.json"),
        ("kitchen={parts}/adapters/garden:{parts}/garden.txt", "'kitchen' is used in this pool already"),
        ("tiny={parts}/adapters/garden:{parts}/garden.txt", "'tiny' is used in this pool already"),
        ("Big Cats={parts}/adapters/garden:{parts}/garden.txt", "lower-case slug"),
        ("poetry={parts}/adapters/garden:{tmp}/one.txt", "expert poetry: 1 example rows are too few"),
        ("poetry={parts}/adapters/garden:{tmp}/blank.txt", "expert poetry: example 2, '?!', has nothing"),
    ],
)
def test_an_expert_that_cannot_be_is_named_and_nothing_is_written(
    parts: Path, tmp_path: Path, expert: str, why: str
) -> None:
    (tmp_path / "one.txt").write_text("a poem about rain\n")
    (tmp_path / "blank.txt").write_text("a poem about rain\n?!\nand snow")
    out = tmp_path / "pool"
    code, output = run(*making(parts, out, "--expert", expert.format(parts=parts, tmp=tmp_path)))
    assert code != 0
    assert why in output
    assert not out.exists()


def test_a_folder_that_is_no_pool_is_left_alone(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    code, output = run(*making(parts, tmp_path))
    assert code != 0
    assert "exists and is no pool" in output


def test_an_adapter_of_another_base_needs_a_word(parts: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "foreign", "foreign", base="someone/else")
    expert = f"foreign={tmp_path}/foreign:{parts}/orchestra.jsonl"
    code, output = run(*making(parts, tmp_path / "p", "--expert", expert))
    assert code != 0
    assert "someone/else" in output
    code, output = run(*making(parts, tmp_path / "p", "--expert", expert, "--any-base"))
    assert code == 0, output
    assert check_pool(tmp_path / "p") == []
