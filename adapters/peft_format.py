"""Ordinary PEFT LoRA directories: `adapter_config.json` and `adapter_model.safetensors`, read and written.

Reading refuses whatever it cannot compute exactly. Writing gives a directory that PEFT itself loads.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from loramux.adapters.adapter_files import CONFIG_FILE, TENSOR_FILE, confined
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import AdapterFormatError
from loramux.adapters.lora import LoraAdapter, LoraPair
from loramux.adapters.peft_config import LoraSettings, read_settings
from loramux.adapters.peft_tensors import StackShape, read_shapes, read_stacks


def read_lora(
    directory: str | Path,
    *,
    id: str,
    base: BaseShapes,
    any_base: bool = False,
    dtype: torch.dtype | None = None,
    root: str | Path | None = None,
) -> LoraAdapter:
    """Read and check a PEFT LoRA directory; all or nothing.

    Args:
        directory: holds `adapter_config.json` and `adapter_model.safetensors`.
        id: the name the adapter gets.
        base: the model it must fit.
        any_base: accept a config that names another base; modules and shapes must still fit.
        dtype: convert the factors; None keeps the widest type found in the file.
        root: directory that both files must lie in after resolving links; None means `directory` itself.

    Returns:
        The adapter. Its content hash covers the bytes of the tensor file and the scale of every module, so
        it is the same whatever `id`, `dtype` or the irrelevant fields of the config are.

    Raises:
        AdapterFormatError: files missing, damaged, or at odds with each other; NaN, infinity, or no effect.
        AdapterPathError: a file lies outside `root`.
        UnsupportedAdapterError: not a plain LoRA.
        BaseMismatchError: made for another base, by name, by modules or by shapes.
    """
    folder = Path(directory)
    settings = read_settings(confined(folder, CONFIG_FILE, root), base_id=base.id, any_base=any_base)
    path = confined(folder, TENSOR_FILE, root)
    stacks = read_stacks(path, settings, base, dtype)
    modules = sorted(module for stack in stacks for module in stack.modules)
    content_hash = _content_hash(path, {module: settings.scale(module) for module in modules})
    return LoraAdapter.from_stacks(id, content_hash, stacks, _summary(settings, modules))


def measure_lora(
    directory: str | Path,
    *,
    base: BaseShapes,
    any_base: bool = False,
    root: str | Path | None = None,
) -> tuple[StackShape, ...]:
    """What `read_lora` would hold in memory, without reading a tensor. Arguments as there.

    Raises:
        AdapterError: as `read_lora`, as far as config and header show it.
    """
    folder = Path(directory)
    settings = read_settings(confined(folder, CONFIG_FILE, root), base_id=base.id, any_base=any_base)
    return read_shapes(confined(folder, TENSOR_FILE, root), settings, base)


def _content_hash(path: Path, scales: Mapping[str, float]) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps(scales, sort_keys=True).encode())
    return digest.hexdigest()


def _summary(settings: LoraSettings, modules: Iterable[str]) -> dict[str, object]:
    return {
        "r": settings.r,
        "lora_alpha": settings.alpha,
        "use_rslora": settings.use_rslora,
        "rank_pattern": bool(settings.rank_patterns),
        "alpha_pattern": bool(settings.alpha_patterns),
        "targets": sorted({module.rpartition(".")[2] for module in modules}),
    }


def write_lora(adapter: LoraAdapter, directory: str | Path, base_id: str) -> None:
    """Write an adapter, or a merged blend, as a PEFT directory that PEFT loads and reproduces.

    One scale and one rank throughout are written as `lora_alpha = scale * r`, so factors keep their bits.
    Otherwise the scales are folded into B (rounded once to its type) and PEFT's own scale is made 1: `r` and
    `lora_alpha` are the commonest rank, the others go to `rank_pattern` and `alpha_pattern`. Targets are full
    module paths: PEFT then adapts exactly these modules.

    Args:
        adapter: what to write.
        directory: created if missing; its two adapter files are replaced.
        base_id: becomes `base_model_name_or_path`.

    Raises:
        AdapterFormatError: no modules, or a folded scale leaves the range of its type; nothing is written.
    """
    if not adapter.pairs:
        raise AdapterFormatError(f"adapter {adapter.id!r} has no modules to write to {directory}")
    ranks = adapter.ranks
    scales = {pair.scale for pair in adapter.pairs.values()}
    common_rank = Counter(ranks.values()).most_common(1)[0][0]
    shared = scales.pop() if len(scales) == 1 and set(ranks.values()) == {common_rank} else None
    others = {module: rank for module, rank in sorted(ranks.items()) if rank != common_rank}
    alpha = common_rank if shared is None else shared * common_rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_id,
        "inference_mode": True,
        "bias": "none",
        "r": common_rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
    }
    tensors: dict[str, Tensor] = {}
    for module, pair in adapter.pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = pair.a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = _b(module, pair, folded=shared is None)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _b(module: str, pair: LoraPair, *, folded: bool) -> Tensor:
    if not folded or pair.scale == 1.0:
        return pair.b.contiguous()
    b = (pair.b.float() * pair.scale).to(pair.b.dtype).contiguous()
    if not torch.isfinite(b).all():
        raise AdapterFormatError(f"{module}: scale {pair.scale:g} times B leaves the range of {b.dtype}")
    return b
