"""GGUF files of every family that is read, against the models that they were written from."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn

from loramux.server.base_files import BaseFiles
from loramux.server.engine.gguf.container import GgufFile
from loramux.server.engine.gguf.folder import write_weights
from loramux.server.engine.gguf.weights import GgufWeights
from loramux.server.engine.model import load_base
from tests.gguf_kit import byte_level_tokenizer, logits, tiny, write_gguf

TOKENIZER = byte_level_tokenizer()
VOCABULARY = TOKENIZER.get_vocab_size()
ROPE = {"rope_theta": 50000.0}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
LLAMA3_ROPE = {
    **ROPE,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + i for i in range(6)],
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,
}


def llama3_divisors(fields: dict[str, Any], head: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter stores for Llama 3, written out frequency by frequency."""
    out = []
    for place in range(head // 2):
        wavelength = 2 * math.pi * fields["rope_theta"] ** (2 * place / head)
        original = fields["original_max_position_embeddings"]
        if wavelength < original / fields["high_freq_factor"]:
            out.append(1.0)
        elif wavelength > original / fields["low_freq_factor"]:
            out.append(fields["factor"])
        else:
            span = fields["high_freq_factor"] - fields["low_freq_factor"]
            smooth = (original / wavelength - fields["low_freq_factor"]) / span
            out.append(1 / ((1 - smooth) / fields["factor"] + smooth))
    return np.array(out, np.float32)


#: name -> (model_type, config fields, metadata, more tensors)
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama": (
        "llama",
        {"rope_parameters": ROPE},
        {"rope.freq_base": 50000.0, "rope.dimension_count": 16},
        {},
    ),
    "llama, wide heads, tied": (
        "llama",
        {"head_dim": 24, "tie_word_embeddings": True},
        {"attention.key_length": 24, "attention.value_length": 24, "rope.dimension_count": 24},
        {},
    ),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}, {}),
    "llama, linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
        {},
    ),
    "llama, llama3": (
        "llama",
        {"rope_parameters": LLAMA3_ROPE},
        {"rope.freq_base": 50000.0, "rope.scaling.original_context_length": 64},
        {"rope_freqs.weight": llama3_divisors(LLAMA3_ROPE, 16)},
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, {}, {}),
    "qwen2, yarn": (
        "qwen2",
        {
            "rope_parameters": {
                **ROPE,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        {
            "rope.freq_base": 50000.0,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
        },
        {},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}, {"attention.key_length": 32, "attention.value_length": 32}, {}),
    "gemma": ("gemma", {"head_dim": 32}, {"attention.key_length": 32, "attention.value_length": 32}, {}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 32,
            "sliding_window": 16,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
        {
            "attention.key_length": 32,
            "attention.value_length": 32,
            "attention.sliding_window": 16,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
        {},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 32,
            "num_hidden_layers": 7,
            "sliding_window": 16,
            "query_pre_attn_scalar": 32,
            "rope_parameters": GEMMA3_ROPE,
        },
        {
            "attention.key_length": 32,
            "attention.value_length": 32,
            "attention.sliding_window": 16,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        {},
    ),
    "phi3": (
        "phi3",
        {"sliding_window": 16},
        {"attention.sliding_window": 16, "rope.dimension_count": 16},
        {},
    ),
    "phi3, longrope, tied": (
        "phi3",
        {
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 64,
            "tie_word_embeddings": True,
        },
        {
            "rope.dimension_count": 12,
            "rope.scaling.original_context_length": 64,
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(4) / math.log(64)),
        },
        {
            "rope_factors_long.weight": np.array(LONGROPE["long_factor"], np.float32),
            "rope_factors_short.weight": np.array(LONGROPE["short_factor"], np.float32),
        },
    ),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    return tmp_path / "cache"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_what_its_model_does(name: str, tmp_path: Path) -> None:
    model_type, fields, keys, extra = FAMILIES[name]
    model = tiny(model_type, VOCABULARY, **fields)
    write_gguf(tmp_path / "tiny.gguf", model, TOKENIZER, keys=keys, extra=extra)
    loaded = load_base(BaseFiles.locate(str(tmp_path / "tiny.gguf")).folder, device="cpu", dtype="float32")
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


MIXED = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.F16, Type.BF16, Type.F32]


@pytest.mark.parametrize("kind", [*MIXED, Type.Q4_K, Type.Q6_K], ids=lambda kind: kind.name)
def test_a_type_is_kept_as_well_as_float16_can(kind: Type, tmp_path: Path) -> None:
    """The model has the values of the file in float32, so the difference is the folder's rounding: none for
    plain floats."""
    wide = {"hidden_size": 256, "intermediate_size": 512} if kind in (Type.Q4_K, Type.Q6_K) else {}
    model = write_gguf(
        tmp_path / "tiny.gguf", tiny("llama", VOCABULARY, **wide), TOKENIZER, type_of=lambda _: kind
    )
    loaded = load_base(BaseFiles.locate(str(tmp_path / "tiny.gguf")).folder, device="cpu", dtype="float32")
    exact = kind in (Type.F16, Type.BF16, Type.F32)
    for (path, value), (_, stored) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        expected = value if exact or value.ndim == 1 else value.half().float()
        assert torch.equal(stored, expected), path
    assert (logits(loaded).argmax(-1) == logits(model).argmax(-1)).float().mean() > 0.97


def q4_0(block: Tensor) -> Tensor:
    """18 bytes: a scale, and sixteen bytes whose low halves are the first sixteen numbers."""
    scale = block[:2].view(torch.float16).float()
    return scale * (torch.cat([block[2:] & 15, block[2:] >> 4]).float() - 8)


def q4_1(block: Tensor) -> Tensor:
    """20 bytes: a scale, a minimum, and numbers as in Q4_0."""
    scale, least = block[:4].view(torch.float16).float()
    return scale * torch.cat([block[4:] & 15, block[4:] >> 4]).float() + least


def q8_0(block: Tensor) -> Tensor:
    """34 bytes: a scale and 32 signed bytes."""
    return block[:2].view(torch.float16).float() * block[2:].view(torch.int8).float()


@pytest.mark.parametrize(
    ("kind", "width", "decode"), [(Type.Q4_0, 18, q4_0), (Type.Q4_1, 20, q4_1), (Type.Q8_0, 34, q8_0)]
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_blocks_decode_to_exactly_the_weights(
    family: str, kind: Type, width: int, decode: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    fields = {"head_dim": 16} if family == "qwen3" else {}
    model = write_gguf(
        tmp_path / "tiny.gguf", tiny(family, VOCABULARY, **fields), TOKENIZER, type_of=lambda _: kind
    )
    base = BaseFiles.locate(str(tmp_path / "tiny.gguf"))
    weights = base.weights()
    assert weights is not None
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert "lm_head" in linears
    assert len(linears) > 8
    for name, module in [*linears.items(), ("model.embed_tokens", model.get_input_embeddings())]:
        blocks = weights.blocks(name)
        assert blocks.type == kind.name
        assert blocks.data.dtype == torch.uint8
        assert blocks.shape == tuple(module.weight.shape)
        rows = [torch.cat([decode(block) for block in row.split(width)]) for row in blocks.data]
        assert torch.equal(torch.stack(rows), module.weight), name
        assert torch.equal(weights.value(f"{name}.weight", torch.float32), module.weight)


def test_a_tied_head_has_the_blocks_of_the_embedding(tmp_path: Path) -> None:
    model = tiny("llama", VOCABULARY, tie_word_embeddings=True)
    write_gguf(tmp_path / "tiny.gguf", model, TOKENIZER, type_of=lambda _: Type.Q8_0)
    weights = GgufWeights.open(tmp_path / "tiny.gguf")
    assert torch.equal(weights.blocks("lm_head").data, weights.blocks("model.embed_tokens").data)
    assert "lm_head.weight" not in weights.shapes
    with pytest.raises(KeyError):
        weights.blocks("model.layers.9.self_attn.q_proj")


def test_a_large_model_is_written_in_pieces(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "tiny.gguf", tiny("llama", VOCABULARY), TOKENIZER)
    folder = tmp_path / "pieces"
    folder.mkdir()
    weights = GgufWeights(GgufFile.read(tmp_path / "tiny.gguf"))
    write_weights(weights, folder, shard_bytes=100_000)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    weights.config.save_pretrained(folder)
    loaded = load_base(folder, device="cpu", dtype="float32")
    assert torch.equal(logits(loaded), logits(model))
