"""LoRAMoE with module paths: the files of its authors' fork of PEFT, and those of this project's container.

The authors write `.lora_route.weight`, `.lora_A0.weight`, `.lora_B0.weight`, peft_type LORA and `lora_nums`;
every expert has rank `r` of its own, and the output is `W0 x + Σ_i softmax(W x)_i · alpha / r · B_i A_i x`.
The other spelling is `.lora_router.weight`, `.lora_A.0.weight` ..., peft_type LORAMOE and `num_experts`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import AdapterFormatError
from loramux.adapters.sparse.blueprint import Blueprint, Parts
from loramux.adapters.sparse.fields import MAX_EXPERTS, Fields
from loramux.adapters.sparse.model import ExpertFactors, ExpertMixture, Kind
from loramux.adapters.sparse.module_paths import PREFIX, AdaptedModules
from loramux.adapters.sparse.moe_peft import refuse_lost_dora
from loramux.adapters.sparse.tensor_file import Naming, TensorFile, Wanted

_AUTHORS = re.compile(r"(base_model\.model\..+)\.lora_(?:(route)|([AB])(\d+))\.weight")
_OURS = re.compile(r"(base_model\.model\..+)\.lora_(?:(router)|([AB])\.(\d+))\.weight")


def loramoe_with_paths(fields: Fields, path: Path, keys: Sequence[str], base: BaseShapes) -> Blueprint:
    """Read the config of a LoRAMoE checkpoint with module paths.

    Raises:
        AdapterError: a field is missing, out of bounds, unknown or not served.
    """
    by_authors = _by_authors(path, keys)
    refuse_lost_dora(fields, allowed=False)
    experts = fields.whole("lora_nums" if by_authors else "num_experts", high=MAX_EXPERTS)
    fields.skip("blc_alpha", "blc_weight", "merge_weights")
    adapted = AdaptedModules.take(fields, keys, base)
    shape = adapted.shape
    wanted: dict[str, Wanted] = {}
    for module in adapted.modules:
        n_out, n_in = base.modules[module]
        wanted[f"{PREFIX}{module}.router"] = Wanted.gate(experts, n_in)
        for a_name, b_name in zip(_names(module, "A", experts), _names(module, "B", experts), strict=True):
            wanted[a_name] = Wanted.a(shape.rank, n_in)
            wanted[b_name] = Wanted.b(n_out, shape.rank)

    def build(file: TensorFile) -> Parts:
        linear = {
            module: ExpertMixture(
                ExpertFactors(
                    a=file.factors(_names(module, "A", experts)),
                    b=file.factors(_names(module, "B", experts)),
                    scale=shape.scale,
                ),
                file.router(f"{PREFIX}{module}.router"),
            )
            for module in adapted.modules
        }
        return Parts({}, linear, {})

    return Blueprint(
        kind=Kind.LORAMOE,
        wanted=wanted,
        stranger=adapted.stranger(path),
        build=build,
        meaning={"scale": shape.scale},
        summary={
            "experts": experts,
            "rank": shape.rank,
            "targets": sorted({module.rpartition(".")[2] for module in adapted.modules}),
        },
        naming=_naming(by_authors),
    )


def _by_authors(path: Path, keys: Iterable[str]) -> bool:
    spellings: dict[bool, str] = {}
    for key in sorted(keys):
        if _AUTHORS.fullmatch(key):
            spellings.setdefault(True, key)
        elif _OURS.fullmatch(key):
            spellings.setdefault(False, key)
    if len(spellings) > 1:
        raise AdapterFormatError(
            f"{path}: keys of two spellings of LoRAMoE in one file: {', '.join(sorted(spellings.values()))}"
        )
    return spellings.popitem()[0] if spellings else True


def _names(module: str, side: str, experts: int) -> list[str]:
    return [f"{PREFIX}{module}.experts.{expert}.{side}" for expert in range(experts)]


def _naming(by_authors: bool) -> Naming:
    pattern = _AUTHORS if by_authors else _OURS

    def name(key: str) -> str | None:
        match = pattern.fullmatch(key)
        if match is None:
            return None
        return f"{match[1]}.router" if match[2] else f"{match[1]}.experts.{int(match[4])}.{match[3]}"

    def key(name: str) -> str:
        module, _, part = name.rpartition(".")
        if part == "router":
            return f"{module}.lora_{'route' if by_authors else 'router'}.weight"
        module, _, expert = module.rpartition(".")
        module = module.removesuffix(".experts")
        return f"{module}.lora_{part}{'' if by_authors else '.'}{expert}.weight"

    return Naming(name, key)
