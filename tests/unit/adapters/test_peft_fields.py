"""The table of config fields against PEFT's own LoraConfig, field by field."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from loramux.adapters.errors import UnsupportedAdapterError
from loramux.adapters.peft_fields import FIELDS
from loramux.adapters.peft_format import read_lora
from tests.peft_kit import BASE, change_config, peft_logits, save_peft, small_llama, tensors, write_tensors
from tests.tiny import with_delta

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*specified but will be ignored:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*contains a `runtime_config` key:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have passed exclude_modules:UserWarning"),
]
TOKENS = torch.arange(1, 9)[None]

HARMLESS: list[dict[str, Any]] = [
    {"task_type": None},
    {"auto_mapping": None},
    {"peft_version": "9.9"},
    {"base_model_name_or_path": "tiny"},
    {"revision": "main"},
    {"inference_mode": False},
    {"lora_dropout": 0.5},
    {"fan_in_fan_out": True},
    {"use_rslora": True},
    {"lora_alpha": -3},
    {"alpha_pattern": {"q_proj": 5, r"layers\.1\..*": 2.5}},
    {"layers_to_transform": [0, 1]},
    {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
    {"exclude_modules": ["lm_head"]},
    {"bias": "all"},
    {"bias": "lora_only"},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "mica"},
    {"loftq_config": {"loftq_bits": 4}},
    {"eva_config": {"rho": 2.0}},
    {"qalora_group_size": 3},
    {"megatron_core": None},
    {"runtime_config": {"ephemeral_gpu_offload": False}},
    {"ensure_weight_tying": True},
]
SET: dict[str, Any] = {
    "use_dora": True,
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1],
    "layer_replication": [[0, 2], [0, 2]],
    "target_parameters": ["mlp.up_proj.weight"],
    "alora_invocation_tokens": [5],
    "arrow_config": {"top_k": 2},
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "kasa_config": {"beta": 1.0},
    "monteclora_config": {"num_samples": 2},
    "velora_config": {"scale": 2.0},
    "megatron_config": {"hidden_size": 24},
}


def test_the_table_has_exactly_the_fields_of_peft() -> None:
    assert set(FIELDS) == {field.name for field in dataclasses.fields(LoraConfig)}


@pytest.mark.parametrize("fields", HARMLESS, ids=str)
def test_what_is_said_to_be_served_computes_what_peft_computes(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    model = small_llama()
    save_peft(tmp_path, small_llama())
    change_config(tmp_path, **fields)
    served = with_delta(model, [(read_lora(tmp_path, id="x", base=BASE, any_base=True), 1.0)])
    with torch.no_grad():
        ours = served(TOKENS).logits
    theirs = peft_logits(model, tmp_path, TOKENS)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.refused])
def test_what_changes_the_result_is_refused_with_the_reason_of_the_table(saved: Path, name: str) -> None:
    change_config(saved, **{name: SET[name]})
    reason = FIELDS[name].refused
    assert reason is not None
    with pytest.raises(UnsupportedAdapterError, match=f"{name} is set: ") as caught:
        read_lora(saved, id="x", base=BASE)
    assert reason in str(caught.value)
    change_config(saved, **{name: None})
    read_lora(saved, id="x", base=BASE)


def test_an_adapted_output_head_was_called_a_module_that_the_base_does_not_have(tmp_path: Path) -> None:
    save_peft(tmp_path, small_llama(), target_modules=["q_proj", "lm_head"])
    with pytest.raises(UnsupportedAdapterError, match="lm_head is the output head"):
        read_lora(tmp_path, id="x", base=BASE)
    kept = {key: value for key, value in tensors(tmp_path).items() if "base_layer" not in key}
    write_tensors(tmp_path, kept)
    with pytest.raises(UnsupportedAdapterError, match="lm_head is the output head"):
        read_lora(tmp_path, id="x", base=BASE)
