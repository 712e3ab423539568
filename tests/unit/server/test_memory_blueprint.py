"""What the base will weigh, said before it is loaded, is what it weighs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from loramux.kernels.packed_linear import Timing, store_weights
from loramux.server.engine.model import load_base
from loramux.server.errors import StartError
from loramux.server.memory.blueprint import Blueprint, loaded_bytes, nf4_bytes
from tests.tiny import tiny_llama

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4}


def with_biases(**overrides: Any) -> Qwen2ForCausalLM:
    sizes = {**SIZES, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 300, **overrides}
    return Qwen2ForCausalLM(Qwen2Config(**sizes))


BASES = {
    "llama": lambda: tiny_llama(**SIZES),
    "llama, tied embeddings": lambda: tiny_llama(**SIZES, tie_word_embeddings=True),
    "qwen2, with biases": with_biases,
    "qwen2, with biases, tied": lambda: with_biases(tie_word_embeddings=True),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("dtype", "quantization"), [("float32", "none"), ("bfloat16", "none"), ("bfloat16", "nf4")]
)
def test_the_estimate_is_within_a_hundredth_of_what_is_loaded(
    tmp_path: Path, base: str, dtype: str, quantization: str
) -> None:
    BASES[base]().save_pretrained(tmp_path)
    blueprint = Blueprint.read(str(tmp_path))
    target = blueprint.target(device="cpu", dtype=dtype, quantization=quantization)
    estimate = blueprint.weight_bytes(target.dtype, target.quantization)
    model = load_base(tmp_path, dtype=dtype, quantization=quantization, device="cpu")
    assert estimate == pytest.approx(loaded_bytes(model), rel=0.01)
    assert blueprint.parameters == sum(p.numel() for p in BASES[base]().parameters())


def test_a_converted_checkpoint_weighs_what_it_becomes(tmp_path: Path) -> None:
    tiny_llama(**SIZES).to(torch.bfloat16).save_pretrained(tmp_path)
    blueprint = Blueprint.read(str(tmp_path))
    loaded = loaded_bytes(load_base(tmp_path, dtype="float32", quantization="none", device="cpu"))
    assert blueprint.weight_bytes(torch.float32, "none") == pytest.approx(loaded, rel=0.01)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("stored", "quantization"), [("bfloat16", "auto"), ("float32", "int8"), ("float32", "int4")]
)
def test_the_estimate_knows_weights_at_their_size(
    tmp_path: Path, base: str, stored: str, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faster = Timing(1, 1, plain=2.0, stored=1.0)
    monkeypatch.setattr("loramux.server.engine.weights.time_product", lambda *_: faster)
    monkeypatch.setattr("loramux.server.engine.weights.library", object)
    BASES[base]().to(getattr(torch, stored)).save_pretrained(tmp_path)
    blueprint = Blueprint.read(str(tmp_path))
    target = blueprint.target(device="cpu", dtype="auto", quantization=quantization)
    assert target.kinds is not None
    assert target.dtype == torch.float32
    model = load_base(tmp_path, dtype="stored", quantization="none", device="cpu")
    plain = loaded_bytes(model)
    store_weights(model, target.kinds)
    estimate = blueprint.weight_bytes(target.dtype, target.quantization, target.kinds)
    assert estimate == pytest.approx(loaded_bytes(model), rel=0.01)
    assert estimate < plain * {"auto": 1.02, "int8": 0.3, "int4": 0.25}[quantization]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "bfloat16"), ("cuda", "auto")])
def test_quantizations_of_a_cpu_are_refused_elsewhere(
    tmp_path: Path, device: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(StartError, match="int4 is for a CPU and computes in float32"):
        Blueprint.read(str(tmp_path)).target(device=device, dtype=dtype, quantization="int4")


def test_four_bits_cost_a_little_over_half_a_byte() -> None:
    assert nf4_bytes(4096 * 4096) / (4096 * 4096) == pytest.approx(0.5 + 1 / 64, rel=1e-3)
    assert nf4_bytes(1) > 1


def test_its_shapes_are_those_of_the_loaded_model(tmp_path: Path) -> None:
    model = tiny_llama(**SIZES)
    model.save_pretrained(tmp_path)
    shapes = Blueprint.read(str(tmp_path)).shapes("tiny").modules
    for path, (n_out, n_in) in shapes.items():
        assert model.get_submodule(path).weight.shape == (n_out, n_in)
    assert len(shapes) == 14


def test_auto_is_what_loading_makes_of_it(tmp_path: Path) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    target = Blueprint.read(str(tmp_path)).target(device="cpu", dtype="auto", quantization="auto")
    model = load_base(tmp_path, device="cpu")
    assert (target.dtype, target.dtype_name) == (model.dtype, "float32")
    assert target.quantization == "none"


def test_keys_and_values_are_counted_as_the_model_shapes_them(tmp_path: Path) -> None:
    model = tiny_llama(**SIZES)
    model.save_pretrained(tmp_path)
    tokens = 24
    with torch.inference_mode():
        cache = model(torch.zeros(1, tokens, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert Blueprint.read(str(tmp_path)).kv_token_bytes(torch.float32) * tokens == held


def test_a_base_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=str(tmp_path)) as caught:
        Blueprint.read(str(tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(StartError, match="nowhere"):
        Blueprint.read(str(tmp_path / "nowhere"))
