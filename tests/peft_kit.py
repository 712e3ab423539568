"""Adapters as PEFT itself makes them, and PEFT as an independent judge of what they compute."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.lora import LoraAdapter, LoraPair

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
A0 = f"{Q0}.lora_A.weight"
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def small_llama() -> LlamaForCausalLM:
    """A random Llama whose projections have five different shapes."""
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


BASE = BaseShapes.from_model(small_llama(), "tiny")


def small_adapter(name: str, rank: int = 4, modules: Sequence[str] = tuple(BASE.modules)) -> LoraAdapter:
    """An adapter of `small_llama` with another scale on every module."""
    pairs = {}
    for i, module in enumerate(modules):
        n_out, n_in = BASE.modules[module]
        pairs[module] = LoraPair(torch.randn(rank, n_in), torch.randn(n_out, rank), 0.3 + 0.1 * i)
    return LoraAdapter(name, f"hash {name}", pairs)


def lora_config(**fields: Any) -> LoraConfig:
    """A LoRA whose B is random instead of zero."""
    chosen = {"r": 4, "lora_alpha": 6, "target_modules": list(SEVEN), "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**chosen, "init_lora_weights": False, **fields})


def save_peft(directory: Path, model: LlamaForCausalLM | None = None, **fields: Any) -> dict[str, Tensor]:
    """Save a random adapter with PEFT.

    Returns:
        Module path -> its delta W in float64, from PEFT's own scaling and factors.
    """
    wrapped = get_peft_model(model or small_llama(), lora_config(**fields))
    wrapped.save_pretrained(directory)
    return _deltas(wrapped, "default")


def _deltas(wrapped: Any, name: str) -> dict[str, Tensor]:
    deltas = {}
    for path, layer in wrapped.base_model.model.named_modules():
        if isinstance(layer, LoraLayer) and name in layer.scaling:
            a, b = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
            deltas[path] = (layer.scaling[name] * (b @ a)).detach()
    return deltas


def change_config(directory: Path, **fields: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def tensors(directory: Path) -> dict[str, Tensor]:
    return dict(load_file(directory / "adapter_model.safetensors"))


def write_tensors(directory: Path, values: Mapping[str, Tensor]) -> None:
    save_file(dict(values), directory / "adapter_model.safetensors", metadata={"format": "pt"})


def peft_logits(model: LlamaForCausalLM, directory: Path, tokens: Tensor) -> Tensor:
    """What real PEFT computes with the adapter of a directory; the model is wrapped in place."""
    wrapped = PeftModel.from_pretrained(model, str(directory)).eval()
    with torch.no_grad():
        logits: Tensor = wrapped(tokens).logits
        return logits


def peft_merge(
    directories: Mapping[str, Path], weights: Mapping[str, float], method: str, **options: Any
) -> dict[str, Tensor]:
    """`add_weighted_adapter` of real PEFT on saved adapters: module path -> delta W in float64."""
    names = list(directories)
    wrapped = PeftModel.from_pretrained(small_llama(), str(directories[names[0]]), adapter_name=names[0])
    for name in names[1:]:
        wrapped.load_adapter(str(directories[name]), adapter_name=name)
    wrapped.add_weighted_adapter(
        names, [weights[name] for name in names], "merged", combination_type=method, **options
    )
    return _deltas(wrapped, "merged")


def distance(adapter: LoraAdapter, deltas: Mapping[str, Tensor]) -> float:
    """Frobenius norm of (adapter - deltas) over that of deltas, dense and in float64."""
    assert set(adapter.pairs) == set(deltas)
    squared = sum(((adapter.delta(path) - delta) ** 2).sum() for path, delta in deltas.items())
    return float((squared / sum((delta**2).sum() for delta in deltas.values())) ** 0.5)


def weighted_sum(parts: Sequence[tuple[Mapping[str, Tensor], float]]) -> dict[str, Tensor]:
    """The float64 sum of w * delta over adapters, module by module."""
    total: dict[str, Tensor] = {}
    for deltas, weight in parts:
        for path, delta in deltas.items():
            total[path] = total.get(path, 0) + weight * delta
    return total
