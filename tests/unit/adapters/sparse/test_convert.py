"""`loramux convert`: pickles to safetensors without running them, old layouts to the new one."""

import json
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterPathError,
    UnsupportedAdapterError,
)
from loramux.adapters.sparse.convert import convert
from loramux.adapters.sparse.read import read_sparse
from loramux.server.cli import main
from tests.peft_kit import SEVEN, tensors
from tests.sparse_kit import (
    LAYOUT_1,
    assert_equal,
    in_old_layout,
    loracoe_config,
    loracoe_tensors,
    mixlora_config,
    mixlora_tensors,
    save,
)


def as_pickle(folder: Path) -> None:
    """Leave the tensors as MoE-PEFT does: a pickle of parameters."""
    values = {key: nn.Parameter(tensor) for key, tensor in tensors(folder).items()}
    (folder / "adapter_model.safetensors").unlink()
    torch.save(values, folder / "adapter_model.bin")


def test_a_pickle_becomes_safetensors_beside_it(base: BaseShapes, tmp_path: Path) -> None:
    save(tmp_path, mixlora_tensors(base), mixlora_config())
    model = read_sparse(tmp_path, id="x", base=base)
    as_pickle(tmp_path)
    done = convert(tmp_path)
    assert (done.path, done.renamed) == (tmp_path / "adapter_model.safetensors", 0)
    assert_equal(read_sparse(tmp_path, id="x", base=base), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.bin",
        "adapter_model.safetensors",
    ]
    with pytest.raises(AdapterFormatError, match=r"is there already.*--out"):
        convert(tmp_path)


@pytest.mark.parametrize("layout", [1, 2])
@pytest.mark.parametrize("pickled", [True, False])
def test_old_layouts_become_the_new_one(base: BaseShapes, tmp_path: Path, layout: int, pickled: bool) -> None:
    values = mixlora_tensors(base)
    old = tmp_path / "old"
    names = dict.fromkeys(SEVEN, True)
    if layout == 1:
        names = {LAYOUT_1.get(name, name): True for name in SEVEN}
    save(old, in_old_layout(values, layout), mixlora_config(target_modules=names, routing_strategy="switch"))
    model = read_sparse(old, id="x", base=base)
    if pickled:
        as_pickle(old)
    done = convert(old, tmp_path / "new", layout=3)
    assert done.tensors == len(values)
    assert done.renamed == sum(".mlp." in key for key in values)
    found = tensors(tmp_path / "new")
    assert found.keys() == values.keys()
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config["routing_strategy"] == "mixlora-switch"
    assert config["target_modules"] == dict.fromkeys(SEVEN, True)
    assert_equal(read_sparse(tmp_path / "new", id="x", base=base), model)


def test_a_pickle_for_upstream_and_back(base: BaseShapes, tmp_path: Path) -> None:
    values = {key: value.bfloat16() for key, value in loracoe_tensors(base, ("q_proj", "up_proj")).items()}
    folder = save(tmp_path / "in", values, loracoe_config(), {"format": "loracoe", "version": "1"})
    convert(folder, tmp_path / "bin", to_bin=True)
    loaded = torch.load(tmp_path / "bin" / "adapter_model.bin", weights_only=True)
    assert loaded.keys() == values.keys()
    assert all(
        loaded[key].dtype == torch.float32 and torch.equal(loaded[key], values[key].float()) for key in values
    )
    convert(folder, tmp_path / "copy")
    with safe_open(tmp_path / "copy" / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "loracoe", "version": "1"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), zipped=st.booleans())
def test_a_damaged_pickle_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, zipped: bool
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "adapter_config.json").write_text("{}")
    path = folder / "adapter_model.bin"
    torch.save({"a": nn.Parameter(torch.ones(3, 4))}, path, _use_new_zipfile_serialization=zipped)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, min(len(content), 600) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")
        try:
            done = convert(folder)
        except AdapterError as error:
            caught = str(error)
            assert "adapter_model.bin" in caught
        else:
            assert done.path.exists()


class Payload:
    """Unpickling it would make a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_pickle_is_run(base: BaseShapes, tmp_path: Path) -> None:
    folder = save(tmp_path / "in", mixlora_tensors(base), mixlora_config())
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"a": Payload(tmp_path / "made")}, folder / "adapter_model.bin")
    with pytest.raises(UnsupportedAdapterError, match="more than tensors"):
        convert(folder)
    assert not (tmp_path / "made").exists()
    assert not (folder / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02.", b"no pickle", b"\x80\x02}q\x00."])
def test_what_is_no_tensor_file_is_refused(base: BaseShapes, tmp_path: Path, content: bytes) -> None:
    save(tmp_path, mixlora_tensors(base), mixlora_config())
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(content)
    with pytest.raises((AdapterFormatError, UnsupportedAdapterError), match=r"adapter_model\.bin"):
        convert(tmp_path)
    torch.save([torch.ones(2)], tmp_path / "adapter_model.bin")
    with pytest.raises(UnsupportedAdapterError, match="expected tensors by name, found list"):
        convert(tmp_path)


def test_a_conversion_that_cannot_be_done_leaves_nothing(base: BaseShapes, tmp_path: Path) -> None:
    folder = save(tmp_path / "in", loracoe_tensors(base, ("q_proj", "up_proj")), loracoe_config())
    with pytest.raises(UnsupportedAdapterError, match="no MixLoRA checkpoint"):
        convert(folder, tmp_path / "out", layout=3)
    with pytest.raises(UnsupportedAdapterError, match="only layout 3"):
        convert(folder, tmp_path / "out", layout=1)
    with pytest.raises(AdapterFormatError, match="directory of their own"):
        convert(folder, layout=3, to_bin=True)
    assert not (tmp_path / "out").exists()
    (folder / "adapter_model.safetensors").rename(tmp_path / "elsewhere")
    (folder / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterPathError, match="outside"):
        convert(folder, tmp_path / "out")


def test_the_command_converts_and_says_so(
    base: BaseShapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in", in_old_layout(mixlora_tensors(base), 2), mixlora_config(routing_strategy="mixtral"))
    as_pickle(tmp_path / "in")
    words = ["loramux", "convert", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--layout", "3"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as exit_code:
        main()
    assert not exit_code.value.code
    assert "adapter_model.safetensors: 66 tensors, 50 renamed" in capsys.readouterr().out
    assert read_sparse(tmp_path / "out", id="x", base=base).ffn
    with pytest.raises(SystemExit) as exit_code:
        main()
    told = capsys.readouterr().err
    assert exit_code.value.code == 1
    assert told.startswith("loramux: ")
    assert "is there already" in told
