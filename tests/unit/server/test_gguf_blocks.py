"""A GGUF base on a CPU is computed with as it lies in the file, with the answers of its decoded weights."""

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import nn
from transformers import PreTrainedModel

from loramux.kernels.packed_linear import Kind, StoredEmbedding, StoredLinear, library
from loramux.server.base_files import BaseFiles
from loramux.server.engine import weights as engine_weights
from loramux.server.engine.model import load_base
from loramux.server.engine.weights import choose_blocks, prepare
from loramux.server.memory.blueprint import Blueprint, loaded_bytes
from tests.gguf_kit import byte_level_tokenizer, logits, tiny, write_gguf

pytestmark = pytest.mark.skipif(library() is None, reason="installed without a C++ compiler")

TOKENIZER = byte_level_tokenizer()
VOCABULARY = TOKENIZER.get_vocab_size()
TYPES = {
    "q_proj": Type.Q4_0, "k_proj": Type.Q4_1, "v_proj": Type.Q8_0, "o_proj": Type.F16, "gate_proj": Type.BF16,
    "up_proj": Type.F32, "down_proj": Type.Q6_K, "embed_tokens": Type.Q4_1, "lm_head": Type.Q8_0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def written(path: Path, family: str, **fields: object) -> PreTrainedModel:
    """A file of all types, and the model in float32 with the values that it has."""
    return write_gguf(
        path,
        tiny(family, VOCABULARY, intermediate_size=256, **fields),
        TOKENIZER,
        type_of=lambda name: TYPES[name.split(".")[-2]],
    )


def served(base: BaseFiles) -> tuple[PreTrainedModel, int]:
    """As the server loads it, and the bytes that were estimated before."""
    found = base.weights()
    blueprint = Blueprint.read(base.folder)
    target = blueprint.target(device="cpu", dtype="auto", quantization="auto", weights=found)
    assert target.dtype == torch.float32
    assert target.kinds is not None
    model = load_base(base.folder, dtype="float16", device="cpu")
    prepare(model, target.device, target.dtype, target.kinds, found)
    return model, blueprint.weight_bytes(target.dtype, target.quantization, target.kinds)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("gemma", {"head_dim": 16, "tie_word_embeddings": True}),
    ],
    ids=["llama", "llama, tied, biases", "qwen2", "gemma"],
)
def test_answers_are_those_of_the_decoded_weights(
    tmp_path: Path, family: str, fields: dict[str, object]
) -> None:
    path = tmp_path / "m.gguf"
    wanted = written(path, family, **fields)
    model, estimated = served(BaseFiles.locate(str(path)))
    layer = model.model.layers[1]
    kinds = {
        name: getattr(getattr(module, "packed", None), "kind", None)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert kinds == {
        "self_attn.q_proj": Kind.Q4_0, "self_attn.k_proj": Kind.Q4_1, "self_attn.v_proj": Kind.Q8_0,
        "self_attn.o_proj": Kind.F16, "mlp.gate_proj": Kind.BF16, "mlp.up_proj": None,
        "mlp.down_proj": Kind.F16,
    }  # fmt: skip
    assert isinstance(model.model.embed_tokens, StoredEmbedding)
    assert isinstance(model.lm_head, StoredLinear)
    assert model.model.embed_tokens.packed.kind is Kind.Q4_1
    for name, value in wanted.named_parameters():
        if "down_proj.weight" in name:  # Q6_K, for which there is no kernel
            value.copy_(value.half())
    torch.testing.assert_close(logits(model), logits(wanted), atol=5e-5, rtol=0)
    for name, value in wanted.named_parameters():
        if value.ndim == 1:
            assert torch.equal(model.get_parameter(name), value), name
    assert estimated == pytest.approx(loaded_bytes(model), rel=0.02)


def test_without_blocks_that_need_decoding_nothing_is_rounded(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    model = tiny("llama", VOCABULARY, tie_word_embeddings=True)
    wanted = write_gguf(path, model, TOKENIZER, type_of=lambda _: Type.Q4_1)
    found, _ = served(BaseFiles.locate(str(path)))
    torch.testing.assert_close(logits(found), logits(wanted), atol=2e-5, rtol=0)
    first = found.model.embed_tokens.packed.data
    assert found.lm_head.packed.data.data_ptr() == first.data_ptr()


def test_what_is_held_how_is_said(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    written(path, "llama")
    found = BaseFiles.locate(str(path)).weights()
    assert found is not None
    why = choose_blocks(found).why
    assert why.startswith("weights stay as they lie in the file: matrices ")
    assert "2 in Q6_K" in why
    assert why.endswith("2 of them decoded to 16 bits, for which there is no kernel")


def test_without_the_library_weights_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_weights, "library", lambda: None)
    path = tmp_path / "m.gguf"
    wanted = written(path, "llama")
    base = BaseFiles.locate(str(path))
    found = base.weights()
    target = Blueprint.read(base.folder).target(
        device="cpu", dtype="auto", quantization="auto", weights=found
    )
    assert target.kinds is None
    model = load_base(base.folder, dtype="float32", device="cpu")
    prepare(model, target.device, target.dtype, target.kinds, found)
    assert target.dtype == torch.float32
    for name, value in wanted.named_parameters():
        if value.ndim == 2 and TYPES[name.split(".")[-2]] not in (Type.F16, Type.BF16, Type.F32):
            value.copy_(value.half())
    torch.testing.assert_close(logits(model), logits(wanted), atol=5e-5, rtol=0)
