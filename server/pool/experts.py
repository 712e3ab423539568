"""The experts of a pool, measured, read and checked."""

import torch

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.peft_format import measure_lora, read_lora
from loramux.adapters.peft_tensors import StackShape
from loramux.server.pool.manifest import Pool


def read_experts(pool: Pool, shapes: BaseShapes, dtype: torch.dtype | None = None) -> dict[str, LoraAdapter]:
    """Every expert by id, in the manifest's order; all or nothing.

    Raises:
        AdapterError: one of them is damaged, unsupported, or does not fit the base.
    """
    return {
        entry.id: read_lora(
            pool.expert_dir(entry),
            id=entry.id,
            base=shapes,
            any_base=entry.any_base,
            dtype=dtype,
            root=pool.root,
        )
        for entry in pool.manifest.experts
    }


def measure_experts(pool: Pool, shapes: BaseShapes) -> dict[str, tuple[StackShape, ...]]:
    """What every expert will hold in memory, from the headers of its files.

    Raises:
        AdapterError: as `read_experts`, as far as configs and headers show it.
    """
    return {
        entry.id: measure_lora(pool.expert_dir(entry), base=shapes, any_base=entry.any_base, root=pool.root)
        for entry in pool.manifest.experts
    }
