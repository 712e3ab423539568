"""LoRACoE. Nobody has published files of it, so the format is this project's (docs/sparse.md).

Tensors are named as PEFT names them, with `.lora_router.weight` beside `.lora_A.weight` and `.lora_B.weight`.
A checkpoint after the warm-up alone has no router, and its tensors are those of an ordinary LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import AdapterFormatError, UnsupportedAdapterError
from loramux.adapters.sparse.blueprint import Blueprint, Parts
from loramux.adapters.sparse.fields import MAX_EXPERTS, Fields
from loramux.adapters.sparse.model import Kind, RankMixture
from loramux.adapters.sparse.module_paths import PREFIX, AdaptedModules
from loramux.adapters.sparse.moe_peft import refuse_lost_dora
from loramux.adapters.sparse.options import ReadOptions
from loramux.adapters.sparse.tensor_file import TensorFile, Wanted

VERSION = "1"
MAX_GAIN = 1e6


def loracoe(
    fields: Fields,
    path: Path,
    keys: Sequence[str],
    base: BaseShapes,
    options: ReadOptions,
    metadata: Mapping[str, str],
) -> Blueprint:
    """Read the config of a LoRACoE checkpoint.

    Raises:
        AdapterError: a field is missing, out of bounds, unknown or not served.
    """
    if metadata.get("format") == "loracoe" and metadata.get("version") != VERSION:
        raise UnsupportedAdapterError(
            f"{path}: its header says version {metadata.get('version')!r}; version {VERSION} is read"
        )
    refuse_lost_dora(fields, allowed=False)
    routed = any(key.endswith(".lora_router.weight") for key in keys)
    adapted = AdaptedModules.take(fields, keys, base)
    rank, scale = adapted.shape.rank, adapted.shape.scale
    experts = fields.whole("num_experts", None if routed else 1, high=MAX_EXPERTS)
    temperature = fields.number("router_temperature", 1.0, low=1e-6, high=1e6)
    gain = _gain(fields, rank)
    _check_phase(fields, routed=routed)
    fields.choice("router_softmax_dim", ("rank",), "rank")
    fields.choice("router_reduction", ("mean",), "mean")
    fields.choice("router_dtype", ("float32", "bfloat16", "float16"), "float32")
    # Without a router the gate decides between the whole delta and one rank-th of it: too much to guess.
    named = fields.choice("router_bypass", ("uniform", "ones"), "uniform" if routed else None)
    bypass = 1.0 if named == "ones" else 1.0 / rank
    uses_router = routed and not options.bypass_router
    wanted: dict[str, Wanted] = {}
    for module in adapted.modules:
        n_out, n_in = base.modules[module]
        wanted[tensor_name(module, "A")] = Wanted.a(rank, n_in)
        wanted[tensor_name(module, "B")] = Wanted.b(n_out, rank)
        if routed:
            axes = ("experts × rank", "in")
            wanted[tensor_name(module, "router")] = Wanted((experts * rank, n_in), axes, router=True)

    def build(file: TensorFile) -> Parts:
        linear = {
            module: RankMixture(
                a=file.factor(tensor_name(module, "A")),
                b=file.factor(tensor_name(module, "B")),
                scale=scale,
                router=file.router(tensor_name(module, "router")) if uses_router else None,
                experts=experts,
                temperature=temperature,
                gain=gain,
                bypass=bypass,
            )
            for module in adapted.modules
        }
        return Parts({}, linear, {})

    summary: dict[str, object] = {
        "experts": experts,
        "rank": rank,
        "gate_gain": gain,
        "targets": sorted({module.rpartition(".")[2] for module in adapted.modules}),
        "router": uses_router,
    }
    if not uses_router:
        summary["router_bypass"] = named
    meaning: dict[str, object] = {"scale": scale, "gain": gain, "experts": experts, "router": uses_router}
    meaning |= {"temperature": temperature} if uses_router else {"bypass": bypass}
    return Blueprint(
        kind=Kind.LORACOE,
        wanted=wanted,
        stranger=adapted.stranger(path),
        build=build,
        meaning=meaning,
        summary=summary,
    )


def _gain(fields: Fields, rank: int) -> float:
    """`gate_gain`: none, rank, or a number: what makes up for a softmax over the rank that sums to 1."""
    value = fields.peek("gate_gain")
    if isinstance(value, str) or value is None:
        return 1.0 if fields.choice("gate_gain", ("none", "rank"), "none") == "none" else float(rank)
    return fields.number("gate_gain", low=0.0, high=MAX_GAIN, above=True)


def _check_phase(fields: Fields, *, routed: bool) -> None:
    if fields.peek("phase") is None:
        return
    phase = fields.choice("phase", ("warmup", "joint"))
    if (phase == "joint") != routed:
        raise AdapterFormatError(
            f"{fields.path}: phase is {phase!r}, but the file has {'' if routed else 'no '}routers"
        )


def tensor_name(module: str, part: str) -> str:
    """Key of a module's A, B or router."""
    return f"{PREFIX}{module}.lora_{part}.weight"
