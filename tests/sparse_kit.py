"""Sparse checkpoints as their authors' programs leave them, not as the code under test would write them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.sparse.model import (
    ExpertFactors,
    ExpertMixture,
    MixtureFfn,
    RankMixture,
    SparseModel,
)
from tests.peft_kit import SEVEN

ARCHITECTURES: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "phi": PhiConfig,
    "phi3": Phi3Config,
}
TARGETS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), SEVEN),
    "phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
}
LAYOUT_1 = {"gate_proj": "w1_proj", "down_proj": "w2_proj", "up_proj": "w3_proj"}


def small_config(architecture: str = "llama") -> PretrainedConfig:
    """Two layers whose projections differ in shape."""
    sizes = {
        "vocab_size": 37,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3 if architecture in ("phi", "phi3") else 1,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    if architecture not in ("phi", "phi3"):
        sizes["head_dim"] = 10
    return ARCHITECTURES[architecture](**sizes)


def small_base(architecture: str = "llama") -> PreTrainedModel:
    """A random model of an architecture, in float32."""
    model = AutoModelForCausalLM.from_config(small_config(architecture), attn_implementation="eager")
    return model.float().eval().requires_grad_(False)


def base_shapes(config: PretrainedConfig, id: str = "tiny") -> BaseShapes:
    with torch.device("meta"):
        return BaseShapes.from_model(AutoModelForCausalLM.from_config(config), id)


def llama_2_7b() -> BaseShapes:
    return base_shapes(LlamaConfig(), "llama-2-7b")


def targeted(base: BaseShapes, targets: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Module path -> (out, in) of the modules with one of these last names."""
    chosen = set(targets)
    return {path: shape for path, shape in base.modules.items() if path.rpartition(".")[2] in chosen}


def pair(key: str, shape: tuple[int, int], rank: int) -> dict[str, Tensor]:
    """Random A and B under `<key>.lora_A.weight` and `<key>.lora_B.weight`."""
    n_out, n_in = shape
    return {
        f"{key}.lora_A.weight": torch.randn(rank, n_in) / n_in**0.5,
        f"{key}.lora_B.weight": torch.randn(n_out, rank),
    }


def mixlora_tensors(
    base: BaseShapes,
    targets: Iterable[str] = SEVEN,
    *,
    experts: int = 4,
    rank: int = 3,
    expert_rank: int | None = None,
) -> dict[str, Tensor]:
    """A random MixLoRA checkpoint in layout 3."""
    tensors: dict[str, Tensor] = {}
    hidden = {
        path: shape
        for path, shape in base.modules.items()
        if path.endswith(("gate_proj", "fc1", "gate_up_proj"))
    }
    for path, (_, n_in) in hidden.items():
        block = path.replace("model.", "mixlora.", 1).rpartition(".")[0]
        tensors[f"{block}.moe_gate.weight"] = torch.randn(experts, n_in)
    for path, shape in targeted(base, targets).items():
        key = path.replace("model.", "mixlora.", 1)
        if ".self_attn." in path:
            tensors |= pair(key, shape, rank)
        else:
            for expert in range(experts):
                tensors |= pair(f"{key}.experts.{expert}", shape, expert_rank or rank)
    return tensors


def in_old_layout(tensors: Mapping[str, Tensor], layout: int) -> dict[str, Tensor]:
    """The same checkpoint in layout 1 or 2."""
    renamed = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        if parts[3] == "mlp" and parts[4] == "moe_gate":
            key = f"mixlora.layers.{parts[2]}.gate.weight"
        elif parts[3] == "mlp":
            projection = LAYOUT_1.get(parts[4], parts[4]) if layout == 1 else parts[4]
            key = f"mixlora.layers.{parts[2]}.experts.{parts[6]}.{projection}.{parts[7]}.weight"
        renamed[key] = tensor
    return renamed


def mixlora_config(**fields: Any) -> dict[str, Any]:
    """A config as the hub has it, private base path included."""
    return {
        "bias": "none",
        "peft_type": "MIXLORA",
        "r": 3,
        "lora_alpha": 6,
        "lora_dropout": 0.05,
        "target_modules": list(SEVEN),
        "routing_strategy": "mixlora",
        "num_experts": 4,
        "act_fn": "silu",
        "top_k": 2,
        "base_model_name_or_path": "tiny",
        "task_type": "QUESTION_ANS",
        **fields,
    }


def linear_tensors(
    prefix: str, base: BaseShapes, targets: Iterable[str], *, experts: int = 3, rank: int = 2, attention: bool
) -> dict[str, Tensor]:
    """LoRAMoE (`attention` False: ordinary LoRA there) or MoLA in the container of MoE-PEFT."""
    tensors: dict[str, Tensor] = {}
    for path, shape in targeted(base, targets).items():
        key = path.replace("model.", f"{prefix}.", 1)
        if ".self_attn." in path and not attention:
            tensors |= pair(key, shape, rank)
            continue
        tensors[f"{key}.moe_gate.weight"] = torch.randn(experts, shape[1])
        for expert in range(experts):
            tensors |= pair(f"{key}.experts.{expert}", shape, rank)
    return tensors


def original_loramoe_tensors(
    base: BaseShapes, targets: Iterable[str], *, experts: int = 3, rank: int = 2, authors: bool = True
) -> dict[str, Tensor]:
    """LoRAMoE with module paths, as its authors spell it or as this project does."""
    tensors: dict[str, Tensor] = {}
    for path, (n_out, n_in) in targeted(base, targets).items():
        key = f"base_model.model.{path}"
        tensors[f"{key}.lora_{'route' if authors else 'router'}.weight"] = torch.randn(experts, n_in)
        for expert in range(experts):
            number = str(expert) if authors else f".{expert}"
            tensors[f"{key}.lora_A{number}.weight"] = torch.randn(rank, n_in)
            tensors[f"{key}.lora_B{number}.weight"] = torch.randn(n_out, rank)
    return tensors


def loracoe_tensors(
    base: BaseShapes, targets: Iterable[str], *, experts: int = 2, rank: int = 4, routers: bool = True
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path, shape in targeted(base, targets).items():
        key = f"base_model.model.{path}"
        tensors |= pair(key, shape, rank)
        if routers:
            tensors[f"{key}.lora_router.weight"] = torch.randn(experts * rank, shape[1])
    return tensors


def loracoe_config(**fields: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORACOE",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "up_proj"],
        "num_experts": 2,
        **fields,
    }


def save(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write an adapter directory."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata,
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def assert_equal(one: SparseModel, other: SparseModel) -> None:
    """Bit by bit, ids apart."""
    assert (one.kind, dict(one.summary)) == (other.kind, dict(other.summary))
    assert one.content_hash == other.content_hash
    assert list(one.plain) == list(other.plain)
    assert list(one.linear) == list(other.linear)
    assert list(one.ffn) == list(other.ffn)
    for path, pair_ in one.plain.items():
        twin = other.plain[path]
        assert pair_.scale == twin.scale
        assert torch.equal(pair_.a, twin.a)
        assert torch.equal(pair_.b, twin.b)
    for path, mixture in one.linear.items():
        _assert_equal_mixture(mixture, other.linear[path])
    for path, block in one.ffn.items():
        _assert_equal_ffn(block, other.ffn[path])


def _assert_equal_mixture(one: RankMixture | ExpertMixture, other: RankMixture | ExpertMixture) -> None:
    if isinstance(one, ExpertMixture):
        assert isinstance(other, ExpertMixture)
        assert one.top_k == other.top_k
        assert torch.equal(one.router, other.router)
        _assert_equal_factors(one.factors, other.factors)
        return
    assert isinstance(other, RankMixture)
    assert (one.scale, one.experts, one.temperature) == (other.scale, other.experts, other.temperature)
    assert (one.gain, one.bypass) == (other.gain, other.bypass)
    assert torch.equal(one.a, other.a)
    assert torch.equal(one.b, other.b)
    assert (one.router is None) == (other.router is None)
    if one.router is not None and other.router is not None:
        assert torch.equal(one.router, other.router)


def _assert_equal_ffn(one: MixtureFfn, other: MixtureFfn) -> None:
    assert (one.routing, one.activation) == (other.routing, other.activation)
    assert torch.equal(one.router, other.router)
    assert list(one.projections) == list(other.projections)
    for name, factors in one.projections.items():
        _assert_equal_factors(factors, other.projections[name])


def _assert_equal_factors(one: ExpertFactors, other: ExpertFactors) -> None:
    assert one.scale == other.scale
    assert torch.equal(one.a, other.a)
    assert torch.equal(one.b, other.b)
