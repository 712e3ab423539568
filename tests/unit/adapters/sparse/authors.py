"""MixLoRA as the authors' package computes it: pip `mixlora` 0.2.3, which is not installed by default."""

import copy
import importlib
import warnings

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loramux.adapters.sparse.model import SparseModel


def weights_of(model: SparseModel) -> dict[str, Tensor]:
    """The tensors of a MixLoRA model under the names of key layout 3."""
    found: dict[str, Tensor] = {}

    def name(path: str) -> str:
        return path.replace("model.layers.", "mixlora.layers.")

    for path, pair in model.plain.items():
        found[f"{name(path)}.lora_A.weight"], found[f"{name(path)}.lora_B.weight"] = pair.a, pair.b
    for path, block in model.ffn.items():
        found[f"{name(path)}.moe_gate.weight"] = block.router
        for projection, factors in block.projections.items():
            for e in range(factors.experts):
                key = f"{name(path)}.{projection}.experts.{e}"
                found[f"{key}.lora_A.weight"] = factors.a[e]
                found[f"{key}.lora_B.weight"] = factors.b[e]
    return found


def theirs(base: PreTrainedModel, model: SparseModel, rank: int, alpha: int) -> PreTrainedModel:
    """The base with the package's code put into a copy of its modules; the weights are shared.

    Its experts are taken out of training mode one by one: they lie in plain dictionaries, where `eval` does
    not reach them, and would drop out while they answer.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    package = importlib.import_module("mixlora")
    targets = {path.rpartition(".")[2] for path in model.plain}
    targets |= {name for block in model.ffn.values() for name in block.projections}
    block = next(iter(model.ffn.values()))
    config = package.MixLoraConfig.from_config(
        {
            "peft_type": "MIXLORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "tiny",
            "bias": "none",
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": 0.05,  # it refuses 0
            "target_modules": sorted(targets),
            "routing_strategy": "mixlora",
            "num_experts": block.experts,
            "act_fn": getattr(base.config, "hidden_activation", None) or base.config.hidden_act,
            "top_k": block.routing.top_k,
        }
    )
    config.adapter_name_, config.dtype_ = "default", torch.float32
    changed = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of whatever it uses that is deprecated by now
        package.model.inject_adapter_in_model(changed, config.check(), weights_of(model))
    changed.eval()
    for layer in changed.model.layers:
        for expert in layer.mlp.mixlora_moes["default"].experts_.values():
            expert.eval()
    return changed
