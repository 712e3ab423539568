"""Sparse models of a pool: listed in pool.json, checked whole, and weighed before anything is loaded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import AdapterError, UnsupportedAdapterError
from loramux.adapters.peft_format import write_lora
from loramux.adapters.sparse.model import Kind
from loramux.adapters.sparse.options import ReadOptions
from loramux.adapters.sparse.recognise import is_sparse
from loramux.server.cli.pool import app
from loramux.server.pool.add_sparse import add_sparse
from loramux.server.pool.check import check_pool
from loramux.server.pool.manifest import (
    BaseEntry,
    Manifest,
    Pool,
    PoolError,
    RouterEntry,
    SparseEntry,
    hash_files,
    read_pool,
    write_manifest,
)
from loramux.server.pool.sparse import measure_sparse_models, read_sparse_models
from tests.tiny import random_adapter, tiny_llama
from tests.tiny_sparse import mixlora_tensors, random_mixlora, save_mixlora

GATE = "mixlora.layers.1.mlp.moe_gate.weight"
FACTOR = "mixlora.layers.0.mlp.up_proj.experts.2.lora_A.weight"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A pool with a base and one MixLoRA model; it has no router."""
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    save_mixlora(random_mixlora(shapes(), "mix"), tmp_path / "sparse" / "mix", "tiny")
    write(tmp_path, SparseEntry("mix", "sparse/mix", Kind.MIXLORA, "four experts"))
    return tmp_path


def shapes() -> BaseShapes:
    return BaseShapes.from_model(tiny_llama(), "tiny")


def write(root: Path, *entries: SparseEntry) -> None:
    manifest = Manifest(
        "loramux-pool", 1, "mine", BaseEntry("tiny", "base"), (), RouterEntry("router"), entries, {}
    )
    write_manifest(root, replace(manifest, files=hash_files(root)))


def change(root: Path, **fields: Any) -> None:
    record = json.loads((root / "pool.json").read_text())
    record["sparse"][0] |= fields
    (root / "pool.json").write_text(json.dumps(record))


def problems(root: Path) -> list[str]:
    return [line for line in check_pool(root) if not line.startswith("router")]


def test_what_is_written_is_read_back(root: Path) -> None:
    pool = read_pool(root)
    assert pool.manifest.sparse == (SparseEntry("mix", "sparse/mix", Kind.MIXLORA, "four experts"),)
    assert problems(root) == []
    (model,) = read_sparse_models(pool, shapes(), torch.bfloat16)
    assert (model.id, model.kind) == ("mix", Kind.MIXLORA)
    assert model.ffn["model.layers.0.mlp"].projections["up_proj"].a.dtype == torch.bfloat16


def test_a_model_is_weighed_without_being_read(root: Path) -> None:
    pool = read_pool(root)
    (model,) = read_sparse_models(pool, shapes())
    size = measure_sparse_models(pool, shapes())["mix"]
    assert size.parameters == sum(tensor.numel() for tensor in mixlora_tensors(model).values())
    assert size.nbytes(torch.bfloat16) < size.nbytes(torch.float32)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kind": "magic"}, "sparse.0.kind"),
        ({"kind": None}, "sparse.0.kind"),
        ({"id": "Mix"}, "sparse.0.id"),
        ({"id": "tiny"}, "'tiny' is used twice"),
        ({"path": "../outside"}, "leads out of the pool"),
        ({"experts": 4}, "sparse.0.experts"),
    ],
)
def test_a_bad_entry_is_named(root: Path, fields: dict[str, Any], named: str) -> None:
    change(root, **fields)
    with pytest.raises(PoolError, match=named.replace(".", r"\.")):
        read_pool(root)


def test_an_entry_of_another_kind_than_its_files(root: Path) -> None:
    change(root, kind="loracoe")
    (line,) = problems(root)
    assert "mix" in line
    assert "loracoe" in line
    assert "mixlora" in line


def test_another_base_needs_the_operators_word(root: Path) -> None:
    save_mixlora(random_mixlora(shapes(), "mix"), root / "sparse" / "mix", "/home/somebody/base")
    entry = SparseEntry("mix", "sparse/mix", Kind.MIXLORA)
    write(root, entry)
    assert "/home/somebody/base" in problems(root)[0]
    write(root, replace(entry, any_base=True))
    assert problems(root) == []


def test_a_model_is_added(root: Path, tmp_path: Path) -> None:
    save_mixlora(random_mixlora(shapes(), "other"), tmp_path / "other", "tiny")
    pool = tmp_path / "pool"
    shutil.copytree(root / "base", pool / "base")
    write(pool)
    entry = add_sparse(pool, tmp_path / "other", id="other", description="mine")
    assert entry == SparseEntry("other", "sparse/other", Kind.MIXLORA, "mine")
    assert read_pool(pool).manifest.sparse == (entry,)
    assert problems(pool) == []
    for taken in ("other", "tiny", "auto", "Upper"):
        with pytest.raises(PoolError, match=taken):
            add_sparse(pool, tmp_path / "other", id=taken)


def test_the_operators_decisions_are_kept_and_followed(root: Path, tmp_path: Path) -> None:
    """On the command line, in the manifest, and when the model is read and weighed."""
    lost = tmp_path / "lost"
    save_mixlora(random_mixlora(shapes(), "lost"), lost, "/home/somebody/base")
    config = json.loads((lost / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    pool = tmp_path / "pool"
    shutil.copytree(root / "base", pool / "base")
    write(pool)
    command = ["add-sparse", str(pool), str(lost), "--id", "lost", "--any-base"]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, UnsupportedAdapterError)
    assert "--allow-missing-dora" in str(refused.exception)
    assert read_pool(pool).manifest.sparse == ()
    done = CliRunner().invoke(app, [*command, "--allow-missing-dora"])
    assert done.exit_code == 0, done.output
    (entry,) = read_pool(pool).manifest.sparse
    assert entry.options == ReadOptions(any_base=True, allow_missing_dora=True)
    assert problems(pool) == []
    assert set(measure_sparse_models(read_pool(pool), shapes())) == {"lost"}


def spoil(tensors: dict[str, torch.Tensor], how: str) -> str:
    """Damage a checkpoint; the tensor that must be named."""
    match how:
        case "missing":
            del tensors[FACTOR]
        case "extra":
            tensors["mixlora.layers.9.mlp.moe_gate.weight"] = torch.zeros(4, 64)
            return "mixlora.layers.9.mlp.moe_gate.weight"
        case "transposed":
            tensors[FACTOR] = tensors[FACTOR].T
        case "nan":
            tensors[FACTOR] = tensors[FACTOR].clone()
            tensors[FACTOR][0, 0] = float("nan")
        case "more experts":
            tensors[GATE] = tensors[GATE][:3]
            return GATE
    return FACTOR


@pytest.mark.parametrize("how", ["missing", "extra", "transposed", "nan", "more experts"])
def test_a_damaged_model_is_refused_by_tensor_and_id(root: Path, how: str) -> None:
    model = random_mixlora(shapes(), "mix")
    tensors = mixlora_tensors(model)
    named = spoil(tensors, how)
    save_mixlora(model, root / "sparse" / "mix", "tiny", tensors)
    write(root, *read_pool(root).manifest.sparse)
    (line,) = problems(root)
    assert line.startswith("sparse model mix: ")
    assert named in line
    pool: Pool = read_pool(root)
    with pytest.raises(AdapterError, match="^sparse model mix: .*" + named.replace(".", r"\.")):
        read_sparse_models(pool, shapes())


def test_what_a_header_shows_is_refused_before_anything_is_loaded(root: Path) -> None:
    model = random_mixlora(shapes(), "mix")
    tensors = mixlora_tensors(model)
    named = spoil(tensors, "transposed")
    save_mixlora(model, root / "sparse" / "mix", "tiny", tensors)
    with pytest.raises(AdapterError, match="^sparse model mix: .*" + named.replace(".", r"\.")):
        measure_sparse_models(read_pool(root), shapes())


def test_a_changed_file_is_found(root: Path) -> None:
    file = root / "sparse" / "mix" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert any("sparse/mix/adapter_model.safetensors" in line for line in check_pool(root))


def test_directories_are_told_by_their_tensors(root: Path, tmp_path: Path) -> None:
    assert is_sparse(root / "sparse" / "mix")
    write_lora(random_adapter(shapes(), 4, "plain"), tmp_path / "plain", "tiny")
    assert not is_sparse(tmp_path / "plain")
    assert not is_sparse(tmp_path / "absent")
    (tmp_path / "plain" / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    assert not is_sparse(tmp_path / "plain")
