"""What is free is what the machine has, within the limit of the control group."""

from pathlib import Path

import pytest
import torch

from loramux.server.memory.room import cgroup_room, device_room, host_room

LIMIT_V1, USED_V1 = "memory.limit_in_bytes", "memory.usage_in_bytes"
LIMIT_V2, USED_V2 = "memory.max", "memory.current"
UNLIMITED_V1 = 2**63 - 4096


def group(folder: Path, limit: object, used: int, *, version: int = 2, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / (LIMIT_V1 if version == 1 else LIMIT_V2)).write_text(f"{limit}\n")
    (folder / (USED_V1 if version == 1 else USED_V2)).write_text(f"{used}\n")
    names = ("total_inactive_file", "total_active_file") if version == 1 else ("inactive_file", "active_file")
    lines = ["anon 5", f"{names[0]} {cached}", f"{names[1]} 7"]
    if version == 1:  # the group's own numbers, without those below it
        lines += ["inactive_file 1", "active_file 1"]
    (folder / "memory.stat").write_text("\n".join(lines) + "\n")


def table(tmp_path: Path, *lines: str) -> Path:
    file = tmp_path / "cgroup"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_the_tightest_group_above_the_process_counts_and_file_cache_is_free(tmp_path: Path) -> None:
    mount = tmp_path / "fs"
    group(mount / "a/b/c", "max", 10)
    group(mount / "a/b", 1000, 600, cached=50)
    group(mount / "a", 5000, 700)
    assert cgroup_room(table(tmp_path, "0::/a/b/c"), mount) == 1000 - 600 + 50 + 7


def test_version_1_counts_what_lies_below_the_group_too(tmp_path: Path) -> None:
    mount = tmp_path / "fs"
    group(mount / "memory/box", 1000, 900, version=1, cached=100)
    group(mount / "memory", UNLIMITED_V1, 10**9, version=1)
    lines = ("5:cpu,cpuacct:/other", "4:memory:/box", "0::/")
    assert cgroup_room(table(tmp_path, *lines), mount) == 1000 - 900 + 100 + 7


@pytest.mark.parametrize(
    ("line", "root", "version"), [("0::/host/x", "", 2), ("4:memory:/host/x", "memory", 1)]
)
def test_in_a_container_the_limit_stands_at_the_root(
    tmp_path: Path, line: str, root: str, version: int
) -> None:
    mount = tmp_path / "fs"
    group(mount / root, 400, 100, version=version)
    assert cgroup_room(table(tmp_path, line), mount) == 307


def test_a_group_over_its_limit_has_no_room(tmp_path: Path) -> None:
    group(tmp_path / "fs/a", 100, 900)
    assert cgroup_room(table(tmp_path, "0::/a"), tmp_path / "fs") == 0


def test_no_limit_is_none(tmp_path: Path) -> None:
    group(tmp_path / "fs/a", "max", 900)
    assert cgroup_room(table(tmp_path, "0::/a"), tmp_path / "fs") is None
    assert cgroup_room(tmp_path / "no such file", tmp_path / "fs") is None


def test_this_machine_has_room() -> None:
    room = device_room(torch.device("cpu"))
    assert room.free > 2**20
    assert room.name == host_room().name
