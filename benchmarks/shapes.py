"""The models that are measured: Llamas with random weights, because the work does not depend on what they
say."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 2048
SHARD_BYTES = 2**31
SPREAD = 0.02
# Of the factors of an expert: what it changes is told from the rounding of 16 bits.
EXPERT_SPREAD = 0.04


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama, and the experts of its pool.

    `kv_heads`: as many as `heads` where not given. `tied`: the output head is the embedding. `has_goals`: the
    goals were set for this shape. `quantization`: of the base on a CUDA device.
    """

    name: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int | None = None
    experts: int = 8
    rank: int = 16
    vocabulary: int = 32000
    tied: bool = False
    has_goals: bool = False
    quantization: str = "nf4"

    def config(self, layers: int | None = None) -> LlamaConfig:
        """Its config, with other `layers` if given."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers if layers is None else layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads or self.heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=self.tied,
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 256, 768, 6, 8, vocabulary=8192, tied=True),
        Shape("135m", 576, 1536, 30, 9, 3, rank=8, vocabulary=49152, tied=True),  # SmolLM2
        Shape("0.39b", 1024, 3072, 24, 16, has_goals=True),
        Shape("7b", 4096, 11008, 32, 32, experts=16, has_goals=True),
        Shape(
            "1b", 2048, 8192, 16, 32, 8, 16, vocabulary=128256, tied=True, has_goals=True, quantization="none"
        ),
        Shape("8b", 4096, 14336, 32, 32, 8, 16, 16, 128256, has_goals=True),
    )
}


def write_base(shape: Shape, folder: Path, dtype: torch.dtype) -> None:
    """A checkpoint of random weights as the server reads them, in shards of about two gigabytes."""
    config = shape.config()
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    kept = skeleton.state_dict()
    if shape.tied:
        del kept["lm_head.weight"]
    shards = list(_shards(kept, dtype.itemsize))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _weight(name, kept[name], dtype, device) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    total = sum(value.numel() * dtype.itemsize for value in kept.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype
    config.save_pretrained(folder)


def _shards(tensors: dict[str, Tensor], itemsize: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, value in tensors.items():
        if names and size + value.numel() * itemsize > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += value.numel() * itemsize
    yield names


def _weight(name: str, like: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    if "norm" in name:
        return torch.ones(like.shape, dtype=dtype)
    return (torch.randn(like.shape, device=device) * SPREAD).to(dtype).cpu()
