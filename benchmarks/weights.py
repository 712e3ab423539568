"""Weights at their size: every layer shape and the whole decode step in each form, against float32."""

from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.bench import Bench
from benchmarks.decode import bare, case
from benchmarks.report import Result, at_least, ratios
from benchmarks.rig import Rig, alternate, running
from benchmarks.shapes import Shape, write_base
from loramux.kernels.packed_linear import Kind, time_product
from loramux.server.engine.weights import HALVES, QUANTIZED
from loramux.server.memory.blueprint import loaded_bytes

#: Forms of the whole model, and the goals for one request of SmolLM2's shape against float32 as it was.
FORMS = {"bfloat16": HALVES[torch.bfloat16], **QUANTIZED}
GOALS = {"bfloat16": 1.7, "int4": 3.5}
SMALL = "135m"
BEFORE, FLOAT32 = "float32, all calls", "float32"


async def weights(bench: Bench) -> Result:
    """Ratios above 1 are gains. Rounded weights are another model, so nothing is said of answers here."""
    result = Result()
    for rows, columns in sorted(layer_shapes(bench.shape), reverse=True):
        for tokens in (1, 16):
            for kind in Kind:
                bench.progress(f"{rows} x {columns}, {tokens}, {kind}")
                found = [time_product(rows, columns, kind, tokens) for _ in range(bench.repeats)]
                what = f"{rows} x {columns}, tokens: {tokens}, {kind}: float32 / this"
                result.add(what, [timing.plain / timing.stored for timing in found], "ratio")
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="loramux-bench-")))
        write_base(bench.shape, folder, torch.bfloat16)
        rigs: dict[str, Rig] = {}
        making = {
            BEFORE: running(folder, bench.shape, pool=False, lean=False),
            FLOAT32: running(folder, bench.shape, pool=False),
            **{name: running(folder, bench.shape, pool=False, kinds=kinds) for name, kinds in FORMS.items()},
        }
        for name, one in making.items():
            rigs[name] = await stack.enter_async_context(one)
            result.add(f"{name}: base", loaded_bytes(rigs[name].model) / 2**20, "MiB")
        for requests, tokens in ((1, 32), (16, 12)):
            what = f"{requests} request{'s' if requests > 1 else ''}"
            cases = {name: case(rig, bare(requests), prompt=8, tokens=tokens) for name, rig in rigs.items()}
            drives = await alternate(cases, max(1, 2 * bench.repeats - 1), bench.telling(what))
            rates = {name: [drive.decode_rate for drive in found] for name, found in drives.items()}
            for name, values in rates.items():
                result.add(f"{what}, {name}", values, "tokens/s")
                if name != BEFORE:
                    limit = GOALS.get(name) if (requests, bench.shape.name) == (1, SMALL) else None
                    goal = None if limit is None else at_least(limit)
                    result.add(f"{what}, {name}: of before", ratios(values, rates[BEFORE]), "ratio", goal)
    return result


def layer_shapes(shape: Shape) -> set[tuple[int, int]]:
    """Rows and columns of the linear layers, the head included."""
    kv = shape.hidden // shape.heads * (shape.kv_heads or shape.heads)
    outputs = (shape.hidden, kv, shape.ffn, shape.vocabulary)
    return {(rows, shape.hidden) for rows in outputs} | {(shape.hidden, shape.ffn)}
