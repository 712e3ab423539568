"""Files that are damaged, missing, executable or elsewhere are refused."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loramux.adapters.errors import AdapterFormatError, AdapterPathError, UnsupportedAdapterError
from loramux.adapters.peft_format import read_lora
from tests.peft_kit import A0, BASE

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def _header(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut in the data": lambda data: data[:-7],
    "cut in the header": lambda data: data[:60],
    "longer than it says": lambda data: data + b"\0" * 16,
    "huge header": lambda data: struct.pack("<Q", 2**60) + data[8:],
    "no json": lambda data: data[:8] + b"#" * (len(data) - 8),
    "shape lies": lambda data: _header(data, lambda header: header[A0].update(shape=[400, 24])),
    "offset lies": lambda data: _header(data, lambda header: header[A0].update(data_offsets=[0, 2**40])),
    "offsets overlap": lambda data: _header(
        data, lambda header: header[A0].update(data_offsets=header[A0.replace("_A", "_B")]["data_offsets"])
    ),
    "a pickle": lambda data: b"\x80\x04cos\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_files_are_refused(saved: Path, damage: Callable[[bytes], bytes]) -> None:
    path = saved / "adapter_model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(AdapterFormatError, match="not a readable safetensors file"):
        read_lora(saved, id="x", base=BASE)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_damaged_configs_are_refused(saved: Path, text: bytes) -> None:
    (saved / "adapter_config.json").write_bytes(text)
    with pytest.raises(AdapterFormatError, match=r"adapter_config\.json"):
        read_lora(saved, id="x", base=BASE)


def test_missing_files_and_pickles_are_named(saved: Path) -> None:
    with pytest.raises(AdapterFormatError, match="no such directory"):
        read_lora(saved / "nowhere", id="x", base=BASE)
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterFormatError, match=r"adapter_model\.safetensors is missing"):
        read_lora(saved, id="x", base=BASE)
    (saved / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsupportedAdapterError, match="pickle"):
        read_lora(saved, id="x", base=BASE)
    (saved / "adapter_config.json").unlink()
    with pytest.raises(AdapterFormatError, match=r"adapter_config\.json is missing"):
        read_lora(saved, id="x", base=BASE)


def test_links_may_not_lead_outside(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    file = saved / "adapter_model.safetensors"
    file.rename(outside / file.name)
    file.symlink_to(outside / file.name)
    with pytest.raises(AdapterPathError, match="outside the allowed directory"):
        read_lora(saved, id="x", base=BASE)
    assert read_lora(saved, id="x", base=BASE, root=saved.parent.parent).pairs
    file.unlink()
    (outside / file.name).rename(saved / "blob")
    file.symlink_to("blob")
    assert read_lora(saved, id="x", base=BASE).pairs
