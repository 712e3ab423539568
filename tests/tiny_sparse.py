"""Random sparse models for a tiny base, in memory and on disk."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.lora import LoraPair
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

SIZE = 0.15
FFN = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "v_proj")


def _hash() -> str:
    return f"sha256:{torch.randint(2**62, ()).item():064x}"


def _factors(shape: tuple[int, int], experts: int, rank: int) -> ExpertFactors:
    n_out, n_in = shape
    a, b = torch.randn(experts, rank, n_in) * SIZE, torch.randn(experts, n_out, rank) * SIZE
    return ExpertFactors(a, b, 0.5)


def random_mixlora(shapes: BaseShapes, name: str, *, experts: int = 4, rank: int = 4) -> SparseModel:
    """MixLoRA over a Llama: experts on every feed-forward projection, plain LoRA on q and v."""
    blocks = sorted({path.rpartition(".")[0] for path in shapes.modules if path.endswith(FFN)})
    hidden = shapes.modules[f"{blocks[0]}.up_proj"][1]
    return SparseModel(
        name,
        Kind.MIXLORA,
        _hash(),
        plain={
            path: LoraPair(torch.randn(rank, n_in) * SIZE, torch.randn(n_out, rank) * SIZE, 0.5)
            for path, (n_out, n_in) in shapes.modules.items()
            if path.endswith(ATTENTION)
        },
        ffn={
            block: MixtureFfn(
                torch.randn(experts, hidden),
                {name: _factors(shapes.modules[f"{block}.{name}"], experts, rank) for name in FFN},
                FfnRouting(FfnStrategy.TOP_K, top_k=2),
            )
            for block in blocks
        },
        summary={"experts": experts, "rank": rank, "top_k": 2},
    )


def random_loracoe(shapes: BaseShapes, name: str, *, experts: int = 3, rank: int = 4) -> SparseModel:
    """LoRACoE on every linear module."""
    return SparseModel(
        name,
        Kind.LORACOE,
        _hash(),
        linear={
            path: RankMixture(
                torch.randn(rank, n_in) * SIZE,
                torch.randn(n_out, rank) * SIZE,
                0.5,
                torch.randn(experts * rank, n_in),
                experts=experts,
                gain=float(rank),
            )
            for path, (n_out, n_in) in shapes.modules.items()
        },
        summary={"experts": experts, "rank": rank},
    )


def random_experts(
    shapes: BaseShapes, name: str, *, experts: int = 3, rank: int = 4, top_k: int | None = None
) -> SparseModel:
    """LoRAMoE on every linear module, or MoLA with `top_k`."""
    return SparseModel(
        name,
        Kind.LORAMOE if top_k is None else Kind.MOLA,
        _hash(),
        linear={
            path: ExpertMixture(_factors(shape, experts, rank), torch.randn(experts, shape[1]), top_k)
            for path, shape in shapes.modules.items()
        },
        summary={"experts": experts, "rank": rank},
    )


def mixlora_tensors(model: SparseModel) -> dict[str, Tensor]:
    """The tensors of a MixLoRA model under the names of MoE-PEFT."""
    tensors: dict[str, Tensor] = {}
    for path, pair in model.plain.items():
        name = f"mixlora.{path.removeprefix('model.')}"
        tensors |= {f"{name}.lora_A.weight": pair.a, f"{name}.lora_B.weight": pair.b}
    for path, block in model.ffn.items():
        name = f"mixlora.{path.removeprefix('model.')}"
        tensors[f"{name}.moe_gate.weight"] = block.router
        for projection, factors in block.projections.items():
            for expert in range(factors.experts):
                place = f"{name}.{projection}.experts.{expert}"
                tensors[f"{place}.lora_A.weight"] = factors.a[expert]
                tensors[f"{place}.lora_B.weight"] = factors.b[expert]
    return tensors


def save_mixlora(
    model: SparseModel, folder: Path, base: str, tensors: dict[str, Tensor] | None = None
) -> None:
    """Write a MixLoRA model as MoE-PEFT does; `tensors` may have been spoiled."""
    config = {
        "peft_type": "MIXLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "bias": "none",
        "r": 4,
        "lora_alpha": 2,
        "lora_dropout": 0.0,
        "target_modules": [*ATTENTION, *FFN],
        "routing_strategy": "mixlora",
        "num_experts": 4,
        "act_fn": "silu",
        "top_k": 2,
    }
    folder.mkdir(parents=True, exist_ok=True)
    saved = mixlora_tensors(model) if tensors is None else tensors
    save_file({key: value.contiguous() for key, value in saved.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
