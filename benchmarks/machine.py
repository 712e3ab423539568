"""The machine: what it is, how fast its memory is, and what a process holds of it."""

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def facts() -> dict[str, Any]:
    """Processor, cores, threads and, where there is one, the GPU."""
    found: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Of Python, of this project and of the packages whose speed is measured."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("loramux", *PACKAGES)}}


def processor() -> str:
    """The model name of the first core."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def read_bandwidth(size: int) -> float:
    """Bytes a second at which all threads together read `size` bytes of float32 once."""
    data = torch.ones(size // 4)
    data.sum()
    started = time.perf_counter()
    data.sum()
    return size / (time.perf_counter() - started)


def copy_bandwidth(size: int) -> float:
    """Bytes a second, read and written, of copying `size` bytes."""
    source, target = torch.ones(size // 4), torch.zeros(size // 4)
    target.copy_(source)
    started = time.perf_counter()
    target.copy_(source)
    return 2 * size / (time.perf_counter() - started)


def resident_bytes(pid: int) -> int | None:
    """What a process holds in memory; `None` where the system does not say."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return None
