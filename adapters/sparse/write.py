"""Sparse models to files, in the layouts of their authors; `read_sparse` reads the same models back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from loramux.adapters.adapter_files import CONFIG_FILE, TENSOR_FILE
from loramux.adapters.errors import AdapterFormatError
from loramux.adapters.lora import LoraPair
from loramux.adapters.sparse.blocks import FFN, place_of
from loramux.adapters.sparse.loracoe import VERSION, tensor_name
from loramux.adapters.sparse.mixlora import DEFAULT_CAPACITY, STRATEGY_NAMES
from loramux.adapters.sparse.model import (
    ExpertFactors,
    ExpertMixture,
    FfnRouting,
    FfnStrategy,
    Kind,
    MixtureFfn,
    RankMixture,
    SparseModel,
)

T = TypeVar("T")


def write_mixlora(
    model: SparseModel,
    directory: str | Path,
    *,
    base_id: str,
    act_fn: str | None = None,
    dropout: float = 0.05,
) -> None:
    """Write MixLoRA in layout 3, as MoE-PEFT does, but as safetensors.

    pip `mixlora` wants the tensors as a pickle (`loramux convert --to-bin`), an `act_fn`, a whole alpha, a
    dropout above 0, and one rank and alpha for attention and experts: it ignores `expert_lora`.

    Args:
        model: of kind MIXLORA, with one rank and scale for attention and one for the experts.
        directory: created if missing; its two adapter files are replaced.
        base_id: becomes `base_model_name_or_path`.
        act_fn: activation of experts that name none.
        dropout: with which it was trained; nothing at serving depends on it.

    Raises:
        AdapterFormatError: the model is not one that the format can hold; nothing is written.
    """
    blocks = _only(model, Kind.MIXLORA, model.ffn, MixtureFfn, others=model.linear)
    said_once = {(block.experts, block.routing, block.activation) for block in blocks.values()}
    if len(said_once) > 1:
        raise _not_uniform(model, "experts, routing and activation", "feed-forward block")
    experts, routing, activation = said_once.pop()
    tensors = _plain_tensors("mixlora", model.plain)
    factors: dict[str, ExpertFactors] = {}
    for path, block in blocks.items():
        prefix = _numbered("mixlora", f"{path}.{FFN}").removesuffix(f".{FFN}")
        tensors[f"{prefix}.moe_gate.weight"] = block.router
        factors |= {f"{path}.{name}": projection for name, projection in block.projections.items()}
    tensors |= _expert_tensors("mixlora", factors)
    expert = _one_shape(model, factors.values())
    outer = _one_shape(model, model.plain.values()) if model.plain else expert
    config = _config("MIXLORA", base_id, outer, [*model.plain, *factors], dropout)
    if expert != outer:
        config["expert_lora"] = {**_lora_fields(*expert), "lora_dropout": float(dropout)}
    config |= {"num_experts": experts, **_routing_fields(model, routing)}
    if (named := activation or act_fn) is not None:
        config["act_fn"] = named
    _save(directory, tensors, config, {"format": "pt"})


def write_loramoe(model: SparseModel, directory: str | Path, *, base_id: str, dropout: float = 0.0) -> None:
    """Write LoRAMoE as MoE-PEFT does, but as safetensors. Arguments as `write_mixlora`.

    Raises:
        AdapterFormatError: the model is not one that the format can hold (mixtures of all experts on the
            feed-forward projections, ordinary LoRA elsewhere, one rank and scale); nothing is written.
    """
    mixtures = _only(model, Kind.LORAMOE, model.linear, ExpertMixture, others=model.ffn)
    for path, mixture in mixtures.items():
        place = place_of(path)
        if mixture.top_k is not None or (place is not None and place.block != FFN):
            raise AdapterFormatError(
                f"sparse model {model.id!r}: {path}: this container holds mixtures of all experts only, and "
                "those only in feed-forward blocks"
            )
    experts = {mixture.factors.experts for mixture in mixtures.values()}
    if len(experts) > 1:
        raise _not_uniform(model, "the number of experts", "module")
    tensors = _plain_tensors("loramoe", model.plain)
    for path, mixture in mixtures.items():
        tensors[f"{_numbered('loramoe', path)}.moe_gate.weight"] = mixture.router
    factors = {path: mixture.factors for path, mixture in mixtures.items()}
    tensors |= _expert_tensors("loramoe", factors)
    shape = _one_shape(model, [*factors.values(), *model.plain.values()])
    config = _config("LORAMOE", base_id, shape, [*model.plain, *factors], dropout)
    config |= {"routing_strategy": "loramoe", "num_experts": experts.pop()}
    _save(directory, tensors, config, {"format": "pt"})


def write_loracoe(model: SparseModel, directory: str | Path, *, base_id: str, dropout: float = 0.0) -> None:
    """Write LoRACoE in this project's format (docs/sparse.md). Arguments as `write_mixlora`.

    Without routers it is written as a checkpoint of the warm-up.

    Raises:
        AdapterFormatError: the model is not one that the format can hold (one rank, scale, gain, temperature
            and number of experts, a bypass of 1 or 1 / rank); nothing is written.
    """
    mixtures = _only(model, Kind.LORACOE, model.linear, RankMixture, others={**model.plain, **model.ffn})
    first = next(iter(mixtures.values()))
    rank, routed = first.a.shape[0], first.router is not None
    fixed = {
        (one.experts, one.temperature, one.gain, one.bypass, one.router is not None)
        for one in mixtures.values()
    }
    if len(fixed) > 1:
        raise _not_uniform(model, "experts, temperature, gain, bypass and having a router", "module")
    if not any(math.isclose(first.bypass, known, rel_tol=1e-6) for known in (1.0, 1.0 / rank)):
        raise AdapterFormatError(
            f"sparse model {model.id!r}: bypass is {first.bypass:g}; the format holds 1 and 1 / rank"
        )
    config = _config("LORACOE", base_id, _one_shape(model, mixtures.values()), mixtures, dropout)
    config |= {
        "target_modules": sorted(mixtures),
        "num_experts": first.experts,
        "router_softmax_dim": "rank",
        "router_reduction": "mean",
        "router_temperature": first.temperature,
        "gate_gain": {1.0: "none", float(rank): "rank"}.get(first.gain, first.gain),
        "router_dtype": "float32",
        "router_bypass": "ones" if first.bypass == 1.0 else "uniform",
        "phase": "joint" if routed else "warmup",
    }
    tensors: dict[str, Tensor] = {}
    for module, mixture in mixtures.items():
        tensors |= {tensor_name(module, "A"): mixture.a, tensor_name(module, "B"): mixture.b}
        if mixture.router is not None:
            tensors[tensor_name(module, "router")] = mixture.router.to(torch.float32)
    _save(directory, tensors, config, {"format": "loracoe", "version": VERSION})


def _only(
    model: SparseModel,
    kind: Kind,
    parts: Mapping[str, object],
    type_: type[T],
    *,
    others: Mapping[str, object],
) -> dict[str, T]:
    found = {path: part for path, part in parts.items() if isinstance(part, type_)}
    if model.kind is not kind or not found or len(found) < len(parts) or others:
        raise AdapterFormatError(
            f"sparse model {model.id!r} is {model.kind}; {kind} and nothing else is written here"
        )
    return found


def _not_uniform(model: SparseModel, what: str, where: str) -> AdapterFormatError:
    return AdapterFormatError(
        f"sparse model {model.id!r}: {what} must be the same in every {where}: the config says them once"
    )


def _one_shape(
    model: SparseModel, parts: Iterable[LoraPair | ExpertFactors | RankMixture]
) -> tuple[int, float]:
    """The rank and scale that all parts share."""
    shapes = {(part.a.shape[-2], float(part.scale)) for part in parts}
    if len(shapes) > 1:
        raise _not_uniform(model, f"rank and scale (here {sorted(shapes)})", "module")
    if not shapes:
        raise AdapterFormatError(f"sparse model {model.id!r}: it has no factors to write")
    return shapes.pop()


def _lora_fields(rank: int, scale: float) -> dict[str, object]:
    """Rank, alpha and rsLoRA: whichever gives a whole alpha, because the authors' programs take no other."""
    for rslora, divisor in ((False, float(rank)), (True, math.sqrt(rank))):
        alpha = scale * divisor
        if alpha >= 0.5 and math.isclose(alpha, round(alpha), rel_tol=1e-12):
            return {"r": rank, "lora_alpha": round(alpha), "use_rslora": rslora}
    return {"r": rank, "lora_alpha": scale * rank, "use_rslora": False}


def _config(
    peft_type: str, base_id: str, shape: tuple[int, float], paths: Iterable[str], dropout: float
) -> dict[str, object]:
    return {
        "bias": "none",
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_id,
        **_lora_fields(*shape),
        "lora_dropout": float(dropout),
        "target_modules": sorted({path.rpartition(".")[2] for path in paths}),
    }


def _routing_fields(model: SparseModel, routing: FfnRouting) -> dict[str, object]:
    fields: dict[str, object] = {"routing_strategy": STRATEGY_NAMES[routing.strategy]}
    if routing.strategy is FfnStrategy.TOP_K:
        fields["top_k"] = routing.top_k
    elif routing.strategy is FfnStrategy.TOP_P:
        fields |= {"top_p": routing.top_p, "temperature": routing.temperature}
    else:
        # The capacity belongs to the training; a model that serves without one still says what it was.
        fields["expert_capacity"] = routing.capacity or model.summary.get("expert_capacity", DEFAULT_CAPACITY)
    return fields


def _plain_tensors(prefix: str, plain: Mapping[str, LoraPair]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path, pair in plain.items():
        name = _numbered(prefix, path)
        tensors |= {f"{name}.lora_A.weight": pair.a, f"{name}.lora_B.weight": pair.b}
    return tensors


def _expert_tensors(prefix: str, factors: Mapping[str, ExpertFactors]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path, experts in factors.items():
        name = _numbered(prefix, path)
        for number in range(experts.experts):
            tensors[f"{name}.experts.{number}.lora_A.weight"] = experts.a[number]
            tensors[f"{name}.experts.{number}.lora_B.weight"] = experts.b[number]
    return tensors


def _numbered(prefix: str, path: str) -> str:
    """`model.layers.3.mlp.up_proj` as `<prefix>.layers.3.mlp.up_proj`."""
    place = place_of(path)
    if place is None:
        raise AdapterFormatError(
            f"{path}: this container numbers layers and holds only layers.N.self_attn and layers.N.mlp"
        )
    return f"{prefix}.layers.{place.layer}.{place.block}.{place.name}"


def _save(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, object],
    metadata: dict[str, str],
) -> None:
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / TENSOR_FILE, metadata=metadata
    )
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
