"""Embeddings saved beside an adapter: a copy of the base's is no reason to refuse it, a change is."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import BaseMismatchError, UnsupportedAdapterError
from loramux.adapters.peft_format import read_lora
from tests.peft_kit import lora_config, peft_logits, small_llama, tensors, write_tensors
from tests.unit.adapters.test_differential import _served_logits

# What PEFT 0.21 does when it saves embeddings.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

EMBED, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
TOKENS = torch.arange(1, 9)[None]


def _base(folder: Path, *, tied: bool, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    config = small_llama().config
    config.tie_word_embeddings = tied
    model = LlamaForCausalLM(config).eval().requires_grad_(False).to(dtype)
    model.save_pretrained(folder)
    return model


def _saved(folder: Path, model: LlamaForCausalLM) -> Path:
    get_peft_model(model, lora_config()).save_pretrained(folder, save_embedding_layers=True)
    return folder


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_embeddings_equal_to_those_of_the_base_are_passed_over(tmp_path: Path, tied: bool) -> None:
    _base(tmp_path / "base", tied=tied)
    load = LlamaForCausalLM.from_pretrained
    saved = _saved(tmp_path / "adapter", load(tmp_path / "base"))
    assert {EMBED, HEAD} <= set(tensors(saved))
    shapes = BaseShapes.from_config_dir(tmp_path / "base", "tiny")
    adapter = read_lora(saved, id="x", base=shapes, any_base=True)
    expected = peft_logits(load(tmp_path / "base"), saved, TOKENS)
    assert torch.allclose(_served_logits(load(tmp_path / "base"), adapter), expected, atol=1e-4)


def test_a_copy_in_a_wider_type_is_still_a_copy(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", tied=False, dtype=torch.bfloat16)
    saved = _saved(tmp_path / "adapter", base.float())
    shapes = BaseShapes.from_config_dir(tmp_path / "base", "tiny")
    read_lora(saved, id="x", base=shapes, any_base=True)


CHANGES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "one value": (EMBED, lambda v: v.index_add(0, torch.tensor([36]), torch.full((1, v.shape[1]), 1e-6))),
    "one value of the head": (HEAD, lambda v: v + 1e-6),
    "a longer vocabulary": (EMBED, lambda v: torch.cat([v, v[:1]])),
    "fewer bits": (EMBED, lambda v: v.bfloat16()),
}


@pytest.mark.parametrize(("key", "change"), CHANGES.values(), ids=CHANGES.keys())
def test_changed_embeddings_are_refused(tmp_path: Path, key: str, change: Callable[[Tensor], Tensor]) -> None:
    saved = _saved(tmp_path / "adapter", _base(tmp_path / "base", tied=False))
    shapes = BaseShapes.from_config_dir(tmp_path / "base", "tiny")
    write_tensors(saved, {**tensors(saved), key: change(tensors(saved)[key])})
    with pytest.raises(UnsupportedAdapterError, match=f"{key}.*not known to equal the base's own"):
        read_lora(saved, id="x", base=shapes, any_base=True)


def test_a_sharded_base_is_looked_up_in_its_index(tmp_path: Path) -> None:
    model = _base(tmp_path / "base", tied=False)
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    saved = _saved(tmp_path / "adapter", model)
    read_lora(saved, id="x", base=BaseShapes.from_config_dir(tmp_path / "shards", "tiny"), any_base=True)


def test_without_the_files_of_the_base_nothing_is_taken_for_equal(tmp_path: Path) -> None:
    model = _base(tmp_path / "base", tied=False)
    shapes = BaseShapes.from_model(model, "tiny")
    saved = _saved(tmp_path / "adapter", model)
    with pytest.raises(UnsupportedAdapterError, match="not known to equal"):
        read_lora(saved, id="x", base=shapes, any_base=True)
    lost = tmp_path / "lost"
    shutil.copytree(tmp_path / "base", lost)
    shapes = BaseShapes.from_config_dir(lost, "tiny")
    values = load_file(lost / "model.safetensors")
    save_file({k: v for k, v in values.items() if "embed" not in k}, lost / "model.safetensors")
    with pytest.raises(UnsupportedAdapterError, match=f"{EMBED}.*not known to equal"):
        read_lora(saved, id="x", base=shapes, any_base=True)


def test_a_base_of_conv1d_is_refused_for_what_it_is(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11))
    with pytest.raises(BaseMismatchError, match=r"GPT2LMHeadModel has no linear module to adapt.*Conv1D"):
        BaseShapes.from_model(model, "gpt2")
