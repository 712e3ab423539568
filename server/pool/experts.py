"""The experts of a pool, read and checked."""

import torch

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.peft_format import read_lora
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
