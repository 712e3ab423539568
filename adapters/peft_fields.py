"""Every field of PEFT's LoraConfig (0.21): what it means, and whether an adapter that sets it can be served.

A test compares this table with LoraConfig itself, so a field that PEFT adds has to be decided on here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Field(NamedTuple):
    """One field of `adapter_config.json`.

    Attributes:
        meaning: what it decides.
        refused: why an adapter in which it is set is not served; None if every valid value is.
    """

    meaning: str
    refused: str | None = None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        # Where it came from.
        "peft_type": Field("the kind of adapter; only LORA is served"),
        "task_type": Field("what the base was used for while training"),
        "auto_mapping": Field("the class of the base"),
        "peft_version": Field("what wrote the file"),
        "base_model_name_or_path": Field("the base; compared with the one served"),
        "revision": Field("the revision of the base"),
        "inference_mode": Field("whether the factors are frozen"),
        # Which modules, and how strongly.
        "r": Field("the rank"),
        "target_modules": Field("the modules: names, or an expression for whole paths"),
        "exclude_modules": Field("modules taken out of the targets"),
        "layers_to_transform": Field("layers that named targets are narrowed down to"),
        "layers_pattern": Field("what stands before a layer's number"),
        "lora_alpha": Field("the scale times the rank"),
        "use_rslora": Field("divides by the root of the rank"),
        "rank_pattern": Field("other ranks for some modules"),
        "alpha_pattern": Field("other alphas for some modules"),
        # A linear module has its weight the right way round: PEFT warns and sets the field to false.
        "fan_in_fan_out": Field("weights are stored transposed (Conv1D)"),
        "bias": Field("whether biases of the base were trained; such tensors are refused by name"),
        # Only while training, or only where another field is set that is refused.
        "lora_dropout": Field("dropout while training"),
        "init_lora_weights": Field("how training began; refused by value where it changes the base"),
        "loftq_config": Field("options of an initialisation"),
        "eva_config": Field("options of an initialisation"),
        "corda_config": Field("options of an initialisation"),
        "lora_ga_config": Field("options of an initialisation"),
        "runtime_config": Field("where PEFT computes"),
        "megatron_core": Field("the module that Megatron's layers come from"),
        "qalora_group_size": Field("an option of use_qalora"),
        "ensure_weight_tying": Field("ties adapters of tied layers, none of which is served"),
        # What changes the result.
        "use_dora": Field("DoRA", "DoRA rescales every output column by a learned magnitude"),
        "lora_bias": Field("a bias beside B", "it trains a bias on lora_B"),
        "modules_to_save": Field("whole modules", "it replaces whole modules of the base"),
        "trainable_token_indices": Field("tokens", "it replaces rows of the embedding"),
        "layer_replication": Field("layers given twice", "it changes the layers of the base"),
        "target_parameters": Field("parameters", "it adapts bare parameters instead of linear modules"),
        "alora_invocation_tokens": Field(
            "activated LoRA", "activated LoRA is switched on by tokens of the prompt"
        ),
        "arrow_config": Field("Arrow", "Arrow routes every token among several adapters"),
        "use_qalora": Field("QALoRA", "QALoRA pools the input features"),
        "use_bdlora": Field("BD-LoRA", "BD-LoRA factors are block-diagonal"),
        "kasa_config": Field("KaSA", "KaSA truncates the base weights and has a third factor"),
        "monteclora_config": Field("MonteCLoRA", "MonteCLoRA adds sampled perturbations"),
        "velora_config": Field("VeLoRA", "VeLoRA keeps extra state beside the factors"),
        "megatron_config": Field("Megatron", "Megatron parallel layers are not served"),
    }
)

_LORAMOE = "it is a LoRAMoE checkpoint: several experts with a router, not one LoRA"
OTHERS: Mapping[str, str] = MappingProxyType(
    {
        "use_mica": "PEFT 0.21 has no such field; its MiCA is init_lora_weights: mica, which is served",
        "lora_nums": _LORAMOE,
        "blc_alpha": _LORAMOE,
        "blc_weight": _LORAMOE,
        "routing_strategy": "it is a MixLoRA checkpoint: routed experts, not one LoRA",
        "num_experts": "it is a mixture with a router, not one LoRA",
    }
)
"""Fields that other versions and other programs write: why an adapter in which one is set is refused."""


def why_refused(name: str) -> str | None:
    """Why an adapter in which this field is set is not served; None if it is served, or nobody knows it."""
    known = FIELDS.get(name)
    return OTHERS.get(name) if known is None else known.refused
