"""Loading the base: safetensors only, 4 bits where asked, one-line errors."""

import asyncio
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file

from loramux.adapters.base_shapes import BaseShapes
from loramux.server.engine.model import (
    BaseModelError,
    keep_four_bit_layout,
    load_base,
    resolve_device,
    resolve_dtype,
    resolve_quantization,
)
from tests.tiny import greedy, random_adapter, random_prompt, running, tiny_llama, with_delta

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(path)
    return path


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 32), (64, 33), (48, 32), (32, 7), (128, 96)])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_four_bit_layers_are_right_in_every_shape_where_bitsandbytes_would_repack_them(
    inputs: int, outputs: int, rows: int
) -> None:
    """As a processor with AVX-512 BF16 has it: there the layer repacks itself, and refuses or errs."""
    torch.manual_seed(inputs + outputs)
    layer = bnb.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(torch.randn(outputs, inputs), requires_grad=False, quant_type="nf4")
    model = torch.nn.Sequential(layer).to("cpu").eval()
    layer.support_avx512bf16_for_cpu = True
    assert keep_four_bit_layout(model) == 1
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    x = torch.randn(rows, inputs)
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    x.requires_grad_(True)
    model(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0].double(), weight.double().sum(dim=0), rtol=1e-5, atol=1e-5)


def test_a_base_in_nf4_serves_mixtures_on_a_cpu(saved: Path) -> None:
    """The oracle is a float32 model of the dequantised weights with the deltas added in."""
    model = load_base(saved, quantization="nf4", device="cpu", dtype="float32")
    packed = {path: module for path, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert len(packed) == 14
    assert all(module.weight.dtype == torch.uint8 for module in packed.values())
    plain: Any = tiny_llama()
    plain.load_state_dict(load_base(saved, quantization="none", device="cpu").state_dict())
    for path, module in packed.items():
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
        plain.get_submodule(path).weight.data = weight.float()
    experts = [random_adapter(BaseShapes.from_model(plain, "tiny"), 4, name) for name in "ab"]
    prompt = random_prompt(20)

    async def scenario() -> list[list[int]]:
        async with running(model, experts) as rig:
            mixtures: list[dict[str, float]] = [{}, {"a": 0.6, "b": 0.4}]
            answers = await asyncio.gather(*(rig.ask(prompt, mixture) for mixture in mixtures))
            return [answer.tokens for answer in answers]

    bare, mixed = asyncio.run(scenario())
    assert bare == greedy(plain, prompt, 24)
    assert mixed == greedy(with_delta(plain, [(experts[0], 0.6), (experts[1], 0.4)]), prompt, 24)


def test_auto_means_what_suits_the_device() -> None:
    assert resolve_quantization("auto", CPU) == "none"
    assert resolve_quantization("auto", CUDA) == "nf4"
    assert resolve_quantization("nf4", CPU) == "nf4"
    assert resolve_dtype("auto", CPU, None) == torch.float32
    assert resolve_dtype("auto", CPU, torch.bfloat16) == torch.bfloat16
    assert resolve_dtype("float16", CPU, torch.bfloat16) == torch.float16


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that must not be there")
def test_a_missing_gpu_is_named() -> None:
    with pytest.raises(BaseModelError, match="no CUDA GPU"):
        resolve_device("cuda")


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="nowhere"):
        load_base(tmp_path / "nowhere")


def test_pickled_weights_are_not_read(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    torch.save(tiny_llama().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"safetensors|no file named"):
        load_base(tmp_path)


def test_a_truncated_file_is_an_error_with_its_directory(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    whole = (saved / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BaseModelError, match=str(tmp_path)):
        load_base(tmp_path)


def test_missing_tensors_are_not_made_up(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    tensors = load_file(saved / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"layers\.1\.mlp\.up_proj"):
        load_base(tmp_path)


def test_code_in_a_checkpoint_is_not_run(saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    config = (saved / "config.json").read_text().rstrip().rstrip("}")
    config += ', "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}'
    (tmp_path / "config.json").write_text(config.replace('"model_type": "llama"', '"model_type": "evil"'))
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()")
    with pytest.raises(BaseModelError):
        load_base(tmp_path)
    assert not marker.exists()
