"""The machine: device, threads, compiled kernels, port."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import torch

from loramux.kernels import decoder_stack, gated_lora, packed_linear, paged_attention, pointwise
from loramux.kernels.mixlora_ffn import native as mixlora_ffn
from loramux.kernels.packed_linear.native import instruction_sets
from loramux.server.doctor.finding import Finding, Level
from loramux.server.engine.model import BaseModelError, resolve_device
from loramux.server.errors import StartError
from loramux.server.listener import address_of, listen
from loramux.server.memory.budget import size_text
from loramux.server.memory.room import host_room
from loramux.server.settings import Settings

_BUILD = "install a C++ compiler (Debian: g++), then pip install --force-reinstall --no-deps loramux"


def machine(settings: Settings) -> Iterator[Finding]:
    """Where the base would run, and with what."""
    try:
        device = resolve_device(settings.device)
    except BaseModelError as error:
        yield Finding("device", Level.PROBLEM, str(error), _cuda_advice())
        return
    if device.type == "cuda":
        yield _gpu(device)
    else:
        yield from _cpu()
    yield _kernels(device)
    yield port(settings)


def _gpu(device: torch.device) -> Finding:
    free, whole = torch.cuda.mem_get_info(device)
    major, minor = torch.cuda.get_device_capability(device)
    text = (
        f"{torch.cuda.get_device_name(device)} (compute {major}.{minor}), {size_text(free)} of "
        f"{size_text(whole)} free, CUDA {torch.version.cuda}"
    )
    if free < whole // 2:
        return Finding("device", Level.NOTE, text, "nvidia-smi names the programs that hold the rest")
    return Finding("device", Level.OK, text)


def _cpu() -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    room = host_room()
    text = f"CPU {_cpu_name()}, {usable} cores, {size_text(room.free)} free on {room.name}"
    advice = _cuda_advice()
    yield Finding("device", Level.NOTE if advice else Level.OK, text, advice)
    cores = min(usable, allowed_cores() or usable)
    threads = torch.get_num_threads()
    if threads > cores:
        yield Finding(
            "threads",
            Level.WARNING,
            f"torch takes {threads} threads, and this process has {cores} cores: they wait for each other",
            f"set OMP_NUM_THREADS={cores}",
        )
    else:
        yield Finding("threads", Level.OK, f"{threads} threads on {cores} cores")


def _cuda_advice() -> str:
    """What to do where there is a GPU that torch does not see; empty where none shows."""
    if torch.cuda.is_available() or not (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists()):
        return ""
    if torch.version.cuda is None:
        return "an NVIDIA driver is here, but torch is a build for CPUs; install a CUDA build of torch"
    return "an NVIDIA driver is here, but torch sees no GPU; see nvidia-smi and CUDA_VISIBLE_DEVICES"


def _cpu_name(table: Path = Path("/proc/cpuinfo")) -> str:
    if table.is_file():
        for line in table.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def allowed_cores(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int | None:
    """Whole cores that a container's limit is worth; None without a limit."""
    if not limit.is_file():
        return None
    quota, period = limit.read_text().split()
    return None if quota == "max" else max(1, math.ceil(int(quota) / int(period)))


def _kernels(device: torch.device) -> Finding:
    if device.type == "cuda":
        if find_spec("triton") is None:
            text = "triton is not installed: adapters run as plain products of torch"
            return Finding("kernels", Level.WARNING, text, "pip install triton")
        return Finding("kernels", Level.OK, "Triton")
    libraries: dict[str, Callable[[], object | None]] = {
        "decoder_stack": decoder_stack.library,
        "gated_lora": gated_lora.native.library,
        "mixlora_ffn": mixlora_ffn.library,
        "packed_linear": packed_linear.native.library,
        "paged_attention": paged_attention.native.library,
        "pointwise": pointwise.library,
    }
    missing = []
    for name, library in libraries.items():
        try:
            if library() is None:
                missing.append(name)
        except (OSError, AttributeError) as error:
            return Finding(
                "kernels", Level.PROBLEM, f"{name} is compiled, but cannot be loaded: {error}", _BUILD
            )
    if missing:
        text = f"not compiled: {', '.join(missing)}; answers are the same, and slower"
        return Finding("kernels", Level.WARNING, text, _BUILD)
    best = instruction_sets()[-1].name
    return Finding("kernels", Level.OK, f"all {len(libraries)} are compiled; this processor has {best}")


def port(settings: Settings) -> Finding:
    """Whether the port is free."""
    if settings.port == 0:
        return Finding("port", Level.OK, "any free one")
    try:
        with contextlib.closing(listen(settings.host, settings.port)) as listener:
            return Finding("port", Level.OK, f"{address_of(settings.host, listener)} is free")
    except StartError as error:
        release = _release_at(settings)
        if release is not None:
            text = f"{settings.port} on {settings.host} is taken by loramux {release}, which answers"
            return Finding("port", Level.NOTE, text, "a second server needs another --port")
        return Finding("port", Level.PROBLEM, str(error))


def _release_at(settings: Settings) -> str | None:
    """The release of the loramux that has the port; None where another program has it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104
    shown = f"[{host}]" if ":" in host else host
    try:
        with urlopen(f"http://{shown}:{settings.port}/openapi.json", timeout=2) as answer:
            about = json.load(answer)["info"]
            return str(about["version"]) if "loramux" in str(about["title"]).lower() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
