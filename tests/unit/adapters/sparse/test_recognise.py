"""Telling a sparse model from a plain LoRA before either is read."""

import json
from pathlib import Path

import pytest
import torch

from loramux.adapters.errors import UnsupportedAdapterError
from loramux.adapters.sparse.read import read_sparse
from loramux.adapters.sparse.recognise import is_sparse
from tests.peft_kit import BASE


@pytest.mark.parametrize(
    ("config", "sparse"),
    [
        ({"peft_type": "MIXLORA", "routing_strategy": "mixlora"}, True),
        ({"peft_type": "LORACOE"}, True),
        ({"peft_type": "LORA", "lora_nums": 4}, True),
        ({"peft_type": "LORA"}, False),
    ],
)
def test_a_mixture_with_pickled_weights_once_was_called_a_plain_lora(
    tmp_path: Path, config: dict[str, object], sparse: bool
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, **config}))
    torch.save({}, tmp_path / "adapter_model.bin")
    assert is_sparse(tmp_path) is sparse
    with pytest.raises(UnsupportedAdapterError, match="loramux convert"):
        read_sparse(tmp_path, id="x", base=BASE)
