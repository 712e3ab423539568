"""LoRAMoE and MoLA as MoE-PEFT writes them: every routed projection has a gate and experts of its own."""

from __future__ import annotations

from pathlib import Path

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.sparse.blocks import ATTENTION, FFN
from loramux.adapters.sparse.blueprint import Blueprint, Parts
from loramux.adapters.sparse.fields import Fields
from loramux.adapters.sparse.model import ExpertMixture, Kind
from loramux.adapters.sparse.moe_peft import MoePeft, refuse_lost_dora
from loramux.adapters.sparse.options import ReadOptions
from loramux.adapters.sparse.tensor_file import TensorFile


def loramoe(fields: Fields, path: Path, base: BaseShapes, options: ReadOptions) -> Blueprint:
    """LoRAMoE: every expert of a feed-forward projection, weighted by a softmax; attention has ordinary LoRA.

    Raises:
        AdapterError: a field is missing, out of bounds, unknown or not served.
    """
    lost_dora = refuse_lost_dora(fields, allowed=options.allow_missing_dora)
    fields.choice("routing_strategy", ("loramoe",), "loramoe")
    return _blueprint(Kind.LORAMOE, MoePeft.take(fields, base, "loramoe"), None, fields, path, lost_dora)


def mola(fields: Fields, path: Path, base: BaseShapes, options: ReadOptions) -> Blueprint:
    """MoLA: the best `top_k` experts of every projection, renormalised.

    Raises:
        AdapterError: a field is missing, out of bounds, unknown or not served.
    """
    lost_dora = refuse_lost_dora(fields, allowed=options.allow_missing_dora)
    fields.choice("routing_strategy", ("mola",), "mola")
    container = MoePeft.take(fields, base, "mola", routed=(ATTENTION, FFN))
    top_k = fields.whole("top_k", 2, high=container.experts)
    return _blueprint(Kind.MOLA, container, top_k, fields, path, lost_dora)


def _blueprint(
    kind: Kind, container: MoePeft, top_k: int | None, fields: Fields, path: Path, lost_dora: bool
) -> Blueprint:
    fields.skip("router_init_range", "router_aux_loss_coef", "router_loss")

    def build(file: TensorFile) -> Parts:
        linear = {
            container.blocks.path(place): ExpertMixture(
                container.factors(file, place), file.router(container.gate(place)), top_k
            )
            for place, _ in container.places()
            if place.block in container.routed
        }
        return Parts(container.plain(file), linear, {})

    summary = container.summary()
    if top_k is not None:
        summary["top_k"] = top_k
    if lost_dora:
        summary["dora"] = "served without: its magnitudes were never saved"
    return Blueprint(
        kind=kind,
        wanted=container.wanted(),
        stranger=container.stranger(path),
        build=build,
        meaning={**container.meaning(), "top_k": top_k},
        summary=summary,
    )
