"""Three experts into one: ours against PEFT's `add_weighted_adapter`, on the same files."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from typing import Any

from .checks import BLEND
from .engines import CORES, Peft
from .files import BASE_ID, Files

# our method -> PEFT's name for it
MERGED = {"exact": "cat", "linear": "linear", "svd": "svd"}


async def time_merges(files: Files, peft: Peft, dtype: str, repeats: int) -> dict[str, Any]:
    """Medians of alternating runs, in milliseconds, with the ratio taken within each."""
    ours = await asyncio.to_thread(_our_merge, files, dtype)
    names, weights = zip(*BLEND, strict=True)
    found: dict[str, Any] = {}
    for method, theirs in MERGED.items():
        await asyncio.to_thread(ours, method)
        pairs: list[tuple[float, float]] = []
        measured: dict[str, Any] = {}
        for _ in range(1 if method == "svd" else repeats):
            started = time.perf_counter()
            await asyncio.to_thread(ours, method)
            mine = time.perf_counter() - started
            measured = await peft.order(do="merge", method=theirs, experts=names, weights=weights)
            pairs.append((mine, measured["seconds"]))
        found[method] = {
            "loramux_ms": 1e3 * statistics.median(mine for mine, _ in pairs),
            "peft_ms": 1e3 * statistics.median(other for _, other in pairs),
            "times_faster": statistics.median(other / mine for mine, other in pairs),
            "peft_method": theirs,
            "peft_measured_layers": f"{measured['measured_layers']} of {measured['layers']}",
        }
    return found


def _our_merge(files: Files, dtype: str) -> Callable[[str], object]:
    """The merge of `BLEND`, its experts read from their PEFT directories."""
    import torch

    from loramux.adapters.base_shapes import BaseShapes
    from loramux.adapters.merge import merge
    from loramux.adapters.peft_format import read_lora

    torch.set_num_threads(CORES)
    base = BaseShapes.from_config_dir(files.base, BASE_ID)
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    parts = [(read_lora(files.adapters[n], id=n, base=base, dtype=kind), weight) for n, weight in BLEND]
    return lambda method: merge(parts, method)
