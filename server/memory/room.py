"""How much memory there is to take, on the GPU and on the machine."""

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_UNLIMITED = "max"


@dataclass(frozen=True, slots=True)
class Room:
    """Free bytes of one memory, and what to call it."""

    name: str
    free: int

    def shared(self, among: int) -> "Room":
        """What one of several processes may take that start at once."""
        return self if among == 1 else Room(f"{self.name}, one of {among} shares", self.free // among)


def device_room(device: torch.device) -> Room:
    """What is free where the base will be: on the GPU, or on this machine when the device is a CPU."""
    if device.type == "cuda":
        return Room(str(device), int(torch.cuda.mem_get_info(device)[0]))
    return host_room()


def host_room() -> Room:
    """What this process may still take of the machine's memory: what is available, within its cgroup."""
    free = int(psutil.virtual_memory().available)
    limited = cgroup_room()
    if limited is not None and limited < free:
        return Room("this machine (cgroup limit)", limited)
    return Room("this machine", free)


def cgroup_room(table: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes below the nearest memory limit of this process's control groups, versions 1 and 2.

    File cache counts as free: the kernel drops it before it refuses memory. In a container the table may name
    a path of the host that is not mounted; the limit then stands at the root of the mount.

    Returns:
        None where there is no limit, or no control groups.
    """
    if not table.is_file():
        return None
    found: list[int] = []
    for line in table.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, limit, usage = mount, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, usage = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        while group.is_relative_to(root):
            if (group / limit).is_file() and (text := (group / limit).read_text().strip()) != _UNLIMITED:
                found.append(int(text) - int((group / usage).read_text()) + _file_cache(group))
            group = group.parent
    return max(0, min(found)) if found else None


def _file_cache(group: Path) -> int:
    """Bytes of cached files charged to a group and those below it."""
    lines = (group / "memory.stat").read_text().splitlines()
    stat = {name: int(value) for name, value in (line.split() for line in lines)}
    prefix = "total_" if "total_inactive_file" in stat else ""
    return stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
