"""What is written as a PEFT directory means the same to PEFT, and to us."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux.adapters.errors import AdapterFormatError
from loramux.adapters.lora import LoraAdapter, LoraPair
from loramux.adapters.merge import merge
from loramux.adapters.peft_format import read_lora, write_lora
from tests.peft_kit import BASE, distance, peft_logits, save_peft, small_llama, tensors, weighted_sum

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def test_an_ordinary_adapter_survives_writing_bit_for_bit(saved: Path, tmp_path: Path) -> None:
    adapter = read_lora(saved, id="x", base=BASE)
    copy = tmp_path / "copy"
    write_lora(adapter, copy, "tiny")
    assert json.loads((copy / "adapter_config.json").read_text())["lora_alpha"] == 6
    before, after = tensors(saved), tensors(copy)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = read_lora(copy, id="x", base=BASE)
    assert all(torch.equal(adapter.delta(module), again.delta(module)) for module in adapter.pairs)


def test_a_written_blend_gives_real_peft_the_same_logits(tmp_path: Path) -> None:
    fields: list[dict[str, Any]] = [
        {
            "rank_pattern": {"model.layers.1.self_attn.v_proj": 6, "(q|k)_proj": 3},
            "alpha_pattern": {"(up|gate)_proj": 1, "v_proj": 40},
            "use_rslora": True,
        },
        {"target_modules": ["q_proj", "down_proj"]},
        {"layers_to_transform": [1]},
    ]
    weights = [0.8, -0.5, 1.3]
    parts, deltas = [], []
    for i, chosen in enumerate(fields):
        deltas.append(save_peft(tmp_path / str(i), **chosen))
        parts.append(read_lora(tmp_path / str(i), id=str(i), base=BASE))
    merged = merge(list(zip(parts, weights, strict=True)), "exact").adapter
    write_lora(merged, tmp_path / "blend", "tiny")
    model = small_llama()
    tokens = torch.randint(0, 37, (2, 11))
    reference = small_llama()
    reference.load_state_dict(model.state_dict())
    for module, delta in weighted_sum(list(zip(deltas, weights, strict=True))).items():
        layer = reference.get_submodule(module)
        layer.weight.data = (layer.weight.double() + delta).float()
    wanted = reference(tokens).logits
    assert not torch.allclose(model(tokens).logits, wanted, atol=1e-2)
    assert torch.allclose(peft_logits(model, tmp_path / "blend", tokens), wanted, atol=2e-5, rtol=1e-4)
    assert (
        distance(read_lora(tmp_path / "blend", id="b", base=BASE), {m: merged.delta(m) for m in merged.pairs})
        < 1e-6
    )


def test_what_cannot_be_written_is_refused_before_a_file_exists(tmp_path: Path) -> None:
    loud = LoraPair(torch.ones(2, 24).half(), torch.full((24, 2), 6e4).half(), 2.0)
    quiet = LoraPair(torch.ones(2, 24).half(), torch.ones(24, 2).half(), 1.0)
    adapter = LoraAdapter("x", "h", {"up": loud, "down": quiet})
    with pytest.raises(AdapterFormatError, match=r"up: scale 2 times B leaves the range of torch\.float16"):
        write_lora(adapter, tmp_path / "out", "tiny")
    with pytest.raises(AdapterFormatError, match="no modules"):
        write_lora(LoraAdapter("x", "h", {}), tmp_path / "out", "tiny")
    assert not (tmp_path / "out").exists()
