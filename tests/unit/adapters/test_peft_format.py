"""What PEFT writes as a plain LoRA is read right."""

from pathlib import Path
from typing import Any

import pytest
import torch

from loramux.adapters.peft_format import read_lora
from tests.peft_kit import BASE, Q0, change_config, save_peft, tensors, write_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank 1": {"r": 1, "lora_alpha": 1},
    "rslora": {"use_rslora": True, "r": 9, "lora_alpha": 5},
    "rank pattern": {"rank_pattern": {"q_proj": 7, "down_proj": 2}},
    "alpha pattern": {"alpha_pattern": {r"layers\.1\..*_proj": 11, "up_proj": 3}},
    "first pattern wins": {"rank_pattern": {r".*\.0\.mlp\.gate_proj": 3, "gate_proj": 5}},
    "all patterns, rslora": {
        "rank_pattern": {"model.layers.1.self_attn.v_proj": 6, "(q|k)_proj": 3},
        "alpha_pattern": {"(up|gate)_proj": 1, "v_proj": 40},
        "use_rslora": True,
    },
    "pattern needs a dot before it": {"rank_pattern": {"proj": 9, "roj": 8}},
    "two targets": {"target_modules": ["q_proj", "down_proj"]},
    "regular expression": {"target_modules": r".*\.1\..*(v_proj|up_proj)"},
    "all linear": {"target_modules": "all-linear"},
    "excluded": {"exclude_modules": ["o_proj", "model.layers.0.mlp.up_proj"]},
    "one layer": {"layers_to_transform": [1]},
    "dropout": {"lora_dropout": 0.3},
}


@pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning")
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_plain_lora_means_what_it_means_to_peft(tmp_path: Path, fields: dict[str, Any]) -> None:
    deltas = save_peft(tmp_path, **fields)
    adapter = read_lora(tmp_path, id="x", base=BASE)
    assert set(adapter.pairs) == set(deltas)
    for module, delta in deltas.items():
        assert torch.allclose(adapter.delta(module), delta, rtol=1e-12, atol=0), module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_keep_their_bits(saved: Path, dtype: torch.dtype) -> None:
    written = {key: value.to(dtype) for key, value in tensors(saved).items()}
    write_tensors(saved, written)
    adapter = read_lora(saved, id="x", base=BASE)
    assert adapter.dtype == dtype
    for module, pair in adapter.pairs.items():
        assert torch.equal(pair.a, written[f"base_model.model.{module}.lora_A.weight"])
        assert torch.equal(pair.b, written[f"base_model.model.{module}.lora_B.weight"])


def test_asked_for_dtype_and_mixed_files(saved: Path) -> None:
    assert read_lora(saved, id="x", base=BASE, dtype=torch.bfloat16).dtype == torch.bfloat16
    mixed = tensors(saved)
    mixed[f"{Q0}.lora_A.weight"] = mixed[f"{Q0}.lora_A.weight"].bfloat16()
    write_tensors(saved, mixed)
    assert read_lora(saved, id="x", base=BASE).dtype == torch.float32


def test_keys_may_carry_the_adapter_name(saved: Path) -> None:
    plain = read_lora(saved, id="x", base=BASE)
    write_tensors(saved, {key.replace(".weight", ".default.weight"): v for key, v in tensors(saved).items()})
    named = read_lora(saved, id="x", base=BASE)
    assert all(torch.equal(plain.delta(module), named.delta(module)) for module in plain.pairs)


def test_the_content_hash_covers_what_is_computed_and_nothing_else(saved: Path) -> None:
    first = read_lora(saved, id="x", base=BASE).content_hash
    change_config(saved, task_type="SEQ_CLS", lora_dropout=0.5, base_model_name_or_path="other")
    assert read_lora(saved, id="y", base=BASE, any_base=True, dtype=torch.bfloat16).content_hash == first
    change_config(saved, lora_alpha=7)
    louder = read_lora(saved, id="x", base=BASE, any_base=True).content_hash
    change_config(saved, lora_alpha=6)
    values = tensors(saved)
    values[f"{Q0}.lora_A.weight"][0, 0] += 1
    write_tensors(saved, values)
    edited = read_lora(saved, id="x", base=BASE, any_base=True).content_hash
    assert len({first, louder, edited}) == 3


def test_sizes_and_ranks(tmp_path: Path) -> None:
    save_peft(tmp_path, rank_pattern={"q_proj": 7})
    adapter = read_lora(tmp_path, id="x", base=BASE)
    assert adapter.max_rank == 7
    assert {rank for module, rank in adapter.ranks.items() if "q_proj" in module} == {7}
    assert adapter.nbytes == sum(value.nbytes for value in tensors(tmp_path).values())


def test_unknown_fields_that_are_off_do_no_harm(saved: Path) -> None:
    change_config(saved, new_flag=False, new_dict={}, new_list=[], new_none=None, new_text="")
    read_lora(saved, id="x", base=BASE)


def test_another_base_can_be_allowed(saved: Path) -> None:
    change_config(saved, base_model_name_or_path="/home/someone/llama")
    read_lora(saved, id="x", base=BASE, any_base=True)
