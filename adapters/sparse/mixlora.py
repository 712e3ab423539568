"""MixLoRA checkpoints of every era (mLoRA, MoE-PEFT, pip `mixlora`).

Layout 1 (mLoRA up to 0.4.2) and 2 (0.4.3 to 0.4.6) put gate and experts beside the layer and differ in the
names of the projections; layout 3 (0.5.0 and later, MoE-PEFT) puts them under the projection. Names here are
those of layout 3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from transformers.activations import ACT2FN

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import AdapterFormatError, UnsupportedAdapterError
from loramux.adapters.sparse.blocks import FFN
from loramux.adapters.sparse.blueprint import Blueprint, Parts
from loramux.adapters.sparse.fields import Fields
from loramux.adapters.sparse.model import FfnRouting, FfnStrategy, Kind, MixtureFfn
from loramux.adapters.sparse.moe_peft import LoraShape, MoePeft, refuse_lost_dora
from loramux.adapters.sparse.options import ReadOptions
from loramux.adapters.sparse.tensor_file import AS_IS, Naming, TensorFile

STRATEGIES = {
    "mixlora": FfnStrategy.TOP_K,
    "mixtral": FfnStrategy.TOP_K,
    "mixlora-dynamic": FfnStrategy.TOP_P,
    "mixlora-switch": FfnStrategy.SWITCH,
    "switch": FfnStrategy.SWITCH,
}
STRATEGY_NAMES = {
    FfnStrategy.TOP_K: "mixlora",
    FfnStrategy.TOP_P: "mixlora-dynamic",
    FfnStrategy.SWITCH: "mixlora-switch",
}
LEGACY_PROJECTIONS = {"w1_proj": "gate_proj", "w2_proj": "down_proj", "w3_proj": "up_proj"}
_TO_LEGACY = {new: old for old, new in LEGACY_PROJECTIONS.items()}
DEFAULT_CAPACITY = 32
MAX_CAPACITY = 2**31

_OLD_GATE = re.compile(r"mixlora\.layers\.(\d+)\.gate\.weight")
_OLD_EXPERT = re.compile(r"mixlora\.layers\.(\d+)\.experts\.(\d+)\.(\w+)\.lora_([AB])\.weight")
_GATE = re.compile(r"mixlora\.layers\.(\d+)\.mlp\.moe_gate\.weight")
_EXPERT = re.compile(r"mixlora\.layers\.(\d+)\.mlp\.(\w+)\.experts\.(\d+)\.lora_([AB])\.weight")


def key_layout(path: Path, keys: Iterable[str]) -> int:
    """Tell the layout of a MixLoRA file: 1, 2 or 3.

    Raises:
        AdapterFormatError: keys of several layouts.
    """
    found: dict[int, str] = {}
    for key in sorted(keys):
        old = _OLD_EXPERT.fullmatch(key)
        if old is not None:
            found.setdefault(1 if old[3] in LEGACY_PROJECTIONS else 2 if old[3] in _TO_LEGACY else 0, key)
        elif _GATE.fullmatch(key) or _EXPERT.fullmatch(key):
            found.setdefault(3, key)
        elif _OLD_GATE.fullmatch(key):
            found.setdefault(0, key)
    if 0 in found and found.keys() & {1, 2}:
        del found[0]
    if len(found) > 1:
        told = ", ".join(f"{key} (layout {layout or '1 or 2'})" for layout, key in sorted(found.items()))
        raise AdapterFormatError(f"{path}: keys of several MixLoRA layouts in one file: {told}")
    return next(iter(found), 3) or 2


def naming(layout: int) -> Naming:
    """Keys of a layout, named as in layout 3."""
    if layout == 3:
        return AS_IS

    def name(key: str) -> str | None:
        if gate := _OLD_GATE.fullmatch(key):
            return f"mixlora.layers.{gate[1]}.{FFN}.moe_gate.weight"
        if expert := _OLD_EXPERT.fullmatch(key):
            projection = LEGACY_PROJECTIONS.get(expert[3], expert[3]) if layout == 1 else expert[3]
            return (
                f"mixlora.layers.{expert[1]}.{FFN}.{projection}.experts.{expert[2]}.lora_{expert[4]}.weight"
            )
        return key

    def key(name: str) -> str:
        if gate := _GATE.fullmatch(name):
            return f"mixlora.layers.{gate[1]}.gate.weight"
        if expert := _EXPERT.fullmatch(name):
            projection = _TO_LEGACY.get(expert[2], expert[2]) if layout == 1 else expert[2]
            return f"mixlora.layers.{expert[1]}.experts.{expert[3]}.{projection}.lora_{expert[4]}.weight"
        return name

    return Naming(name, key)


def mixlora(
    fields: Fields, path: Path, keys: Iterable[str], base: BaseShapes, options: ReadOptions
) -> Blueprint:
    """Read the config of a MixLoRA checkpoint.

    Raises:
        AdapterError: a field is missing, out of bounds, unknown or not served.
    """
    layout = key_layout(path, keys)
    experts_dora = False

    def expert_shape(outer: LoraShape) -> LoraShape:
        nonlocal experts_dora
        inner = fields.inner("expert_lora")
        if inner is None:
            return outer
        inner.skip("base_model_name_or_path", "target_modules")
        shape = LoraShape.take(inner)
        experts_dora = refuse_lost_dora(inner, allowed=options.allow_missing_dora)
        inner.finish()
        return shape

    lost_dora = refuse_lost_dora(fields, allowed=options.allow_missing_dora)
    container = MoePeft.take(
        fields, base, "mixlora", expert=expert_shape, gate_per_block=True, rename=LEGACY_PROJECTIONS
    )
    routing, routing_summary = _routing(fields, container.experts, options)
    activation = _activation(fields)
    fields.skip("router_init_range", "router_aux_loss_coef", "router_z_loss_coef", "router_loss")
    fields.skip("jitter_noise", "ffn_dropout", "sparse_step")
    meaning = {
        **container.meaning(),
        "strategy": routing.strategy,
        "top_k": routing.top_k,
        "top_p": routing.top_p,
        "temperature": routing.temperature,
        "capacity": routing.capacity,
        "activation": activation,
    }

    def build(file: TensorFile) -> Parts:
        ffn = {}
        for layer in container.blocks.layers:
            ffn[container.blocks.ffn_path(layer)] = MixtureFfn(
                router=file.router(container.block_gate(layer)),
                projections={
                    place.name: container.factors(file, place)
                    for place, _ in container.places()
                    if place.layer == layer and place.block == FFN
                },
                routing=routing,
                activation=activation,
            )
        return Parts(container.plain(file), {}, ffn)

    summary = {**container.summary(), **routing_summary}
    if lost_dora or experts_dora:
        summary["dora"] = "served without: its magnitudes were never saved"
    return Blueprint(
        kind=Kind.MIXLORA,
        wanted=container.wanted(),
        stranger=container.stranger(path),
        build=build,
        meaning=meaning,
        summary=summary,
        naming=naming(layout),
    )


def _routing(fields: Fields, experts: int, options: ReadOptions) -> tuple[FfnRouting, dict[str, object]]:
    """Defaults are those of MoE-PEFT, which saves only some of these fields."""
    name = fields.choice("routing_strategy", tuple(STRATEGIES))
    strategy = STRATEGIES[name]
    told: dict[str, object] = {"strategy": strategy.value}
    if strategy is FfnStrategy.TOP_K:
        fields.skip("top_p", "temperature", "expert_capacity")
        top_k = fields.whole("top_k", 2, high=experts)
        return FfnRouting(strategy, top_k=top_k), {**told, "top_k": top_k}
    if strategy is FfnStrategy.TOP_P:
        fields.skip("top_k", "expert_capacity")
        top_p = fields.number("top_p", 0.8, low=0.0, high=1.0, above=True)
        temperature = fields.number("temperature", 0.0, low=0.0, high=1e6)
        told |= {"top_p": top_p, "temperature": temperature}
        return FfnRouting(strategy, top_p=top_p, temperature=temperature), told
    fields.skip("top_k", "top_p", "temperature")
    capacity = fields.whole("expert_capacity", DEFAULT_CAPACITY, high=MAX_CAPACITY)
    told |= {"expert_capacity": capacity, "drops_tokens": options.replay_capacity}
    return FfnRouting(strategy, capacity=capacity if options.replay_capacity else None), told


def _activation(fields: Fields) -> str | None:
    name = fields.peek("act_fn")
    fields.skip("act_fn")
    if name is not None and (not isinstance(name, str) or name not in ACT2FN):
        raise UnsupportedAdapterError(
            f"{fields.path}: act_fn is {str(name)[:60]!r}, which transformers does not know"
        )
    return name
