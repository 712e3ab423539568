"""MixLoRA against pip `mixlora`, the authors' own inference code, where that is installed."""

import copy
import warnings

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from loramux.adapters.arena import Arena
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.layers import AdapterLayers
from loramux.adapters.sparse.model import SparseModel
from loramux.adapters.sparse.slot import place
from loramux.kernels.gated_lora import plan_step
from tests.unit.adapters.sparse.random_models import mixlora, tiny_base

package = pytest.importorskip(
    "mixlora", reason="pip install --no-deps mixlora==0.2.3, which pins a transformers of its own"
)

RANK, ALPHA = 4, 6


def weights_of(model: SparseModel) -> dict[str, Tensor]:
    """The tensors under the names of key layout 3."""
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


def theirs(base: PreTrainedModel, model: SparseModel, activation: str, top_k: int) -> PreTrainedModel:
    """The base with their code put into it; their experts are forced out of training mode, as nothing else
    reaches them."""
    targets = {path.rpartition(".")[2] for path in model.plain}
    targets |= {name for block in model.ffn.values() for name in block.projections}
    config = package.MixLoraConfig.from_config(
        {
            "peft_type": "MIXLORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "tiny",
            "bias": "none",
            "r": RANK,
            "lora_alpha": ALPHA,
            "lora_dropout": 0.05,
            "target_modules": sorted(targets),
            "routing_strategy": "mixlora",
            "num_experts": next(iter(model.ffn.values())).experts,
            "act_fn": activation,
            "top_k": top_k,
        }
    )
    config.adapter_name_, config.dtype_ = "default", torch.float32
    changed = copy.deepcopy(base)
    package.model.inject_adapter_in_model(changed, config.check(), weights_of(model))
    changed.eval()
    for layer in changed.model.layers:
        for expert in layer.mlp.mixlora_moes["default"].experts_.values():
            expert.eval()
    return changed


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gemma", "gemma2", "phi", "phi3"])
def test_logits_equal_those_of_the_package(kind: str) -> None:
    base = tiny_base(kind)
    shapes = BaseShapes.from_model(base, "tiny")
    model = mixlora(shapes, experts=5, rank=RANK, scale=ALPHA / RANK)
    config = base.config
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, of whatever they use that is deprecated by now
        oracle = theirs(base, model, activation, top_k=2)
    layers = AdapterLayers(base, Arena(shapes, 1))
    slot = place(model)
    for length in (1, 30):
        prompt = torch.randint(3, 120, (2, length))
        with torch.inference_mode():
            wanted = oracle(input_ids=prompt, use_cache=False).logits
            with layers.running(plan_step([(slot, 2 * length)])):
                found = base(input_ids=prompt, use_cache=False).logits
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
