"""What it takes to run: the time to start, the memory held, and the memory read for every token."""

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from transformers import LlamaForCausalLM

from benchmarks import machine
from benchmarks.bench import Bench
from benchmarks.report import Result, ratios
from benchmarks.rig import WEIGHTS, Rig
from benchmarks.shapes import SPREAD
from loramux.adapters.arena import Arena
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.blend import Blend
from loramux.adapters.residency import Residency
from tests.kit import DEMO_POOL
from tests.tiny import random_adapter

MIB = 2**20
BANDWIDTH_BYTES = 2**30
CONTEXT = 16


@dataclass(frozen=True)
class Start:
    """One start of the server: seconds from the process's beginning to a /ready that says yes, and bytes
    held."""

    seconds: float
    resident: int | None


async def cold_start(bench: Bench) -> Result:
    """`loramux serve` on the demo pool; the files are in the page cache after the first start."""
    starts = []
    for repeat in range(bench.repeats):
        bench.progress(f"start {repeat + 1} of {bench.repeats}")
        starts.append(start_server())
    result = Result()
    result.add("process start to /ready", [start.seconds for start in starts], "s")
    held = [start.resident / MIB for start in starts if start.resident is not None]
    if held:
        result.add("memory of the process, demo pool", held, "MiB")
    return result


def start_server() -> Start:
    """Start the demo server, wait for /ready, end it.

    Raises:
        RuntimeError: it did not start; with what it said.
    """
    loramux = str(Path(sys.executable).parent / "loramux")
    command = [loramux, "serve", "--pool", str(DEMO_POOL), "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    started = time.perf_counter()
    with subprocess.Popen(  # noqa: S603 - the command of this project
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        said: list[str] = []
        try:
            for line in process.stdout:
                said.append(line)
                if ready := re.search(r"ready at (http://\S+)", line):
                    httpx.get(f"{ready.group(1)}/ready", timeout=30).raise_for_status()
                    return Start(time.perf_counter() - started, machine.resident_bytes(process.pid))
            raise RuntimeError(f"loramux serve did not start: {''.join(said)}")
        finally:
            process.terminate()
            process.communicate(timeout=60)


async def memory(bench: Bench) -> Result:
    """Bytes on the device of one expert, and of blends of three resident experts."""
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(bench.shape.config())
    shapes = BaseShapes.from_model(skeleton, bench.shape.name)
    experts = {name: random_adapter(shapes, bench.shape.rank, name, SPREAD) for name in ("a", "b", "c")}
    residency = Residency(experts, Arena(shapes, 4 * bench.shape.rank))

    def blend(*weights: float, method: str = "exact") -> Blend:
        held = zip(experts.values(), weights, strict=False)
        return Blend.of([(expert.id, expert.content_hash, weight) for expert, weight in held], method=method)

    stages = {
        "one expert": blend(1.0),
        "two more": blend(*WEIGHTS),
        "another exact blend of the same three": blend(*reversed(WEIGHTS)),
        "their svd blend": blend(*WEIGHTS, method="svd"),
    }
    result = Result()
    for name, asked in stages.items():
        before = residency.stats().used_bytes
        async with residency.lease(asked) as lease:
            used = residency.stats().used_bytes - before
            gate = lease.handle.slot.gate.nbytes if lease.handle is not None else 0
        result.add(f"{name}: copied", used / MIB, "MiB")
        if name.startswith("another"):
            result.add(f"{name}: gate", gate, "bytes")
    result.add("three experts on the host", residency.stats().host_bytes / MIB, "MiB")
    return result


async def floor(bench: Bench) -> Result:
    """One request without experts, against what reading its bytes alone would take.

    A decode step reads every weight once (of the embedding one row, unless the head is tied to it) and the
    keys and values so far. Sixteen requests read the same weights, and are bound by arithmetic instead.
    """
    rig = await bench.rig()
    tokens = 32
    step = step_bytes(rig, CONTEXT + tokens // 2)
    reads, copies, rates = [], [], []
    for repeat in range(bench.repeats):
        bench.progress(f"{repeat + 1} of {bench.repeats}")
        reads.append(machine.read_bandwidth(BANDWIDTH_BYTES))
        copies.append(machine.copy_bandwidth(BANDWIDTH_BYTES))
        rates.append((await rig.drive([Blend.bare()], prompt=CONTEXT, tokens=tokens)).decode_rate)
    result = Result()
    result.add("memory, reading", [value / 1e9 for value in reads], "GB/s")
    result.add("memory, copying", [value / 1e9 for value in copies], "GB/s")
    result.add("bytes read a step", step / 1e9, "GB")
    result.add("1 request at the floor", [read / step for read in reads], "tokens/s")
    result.add("1 request, base", rates, "tokens/s")
    result.add("1 request, base: of the floor", ratios(rates, [read / step for read in reads]), "ratio")
    return result


def step_bytes(rig: Rig, context: int) -> int:
    """Bytes of weights, keys and values that one token of one request needs, in the model's own type."""
    config = rig.model.config
    size = rig.model.dtype.itemsize
    head = config.hidden_size // config.num_attention_heads
    layer = config.hidden_size * head * 2 * (config.num_attention_heads + config.num_key_value_heads)
    layer += 3 * config.hidden_size * config.intermediate_size
    weights = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * head * context
    return int((weights + values) * size)
