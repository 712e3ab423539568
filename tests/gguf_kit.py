"""Tiny GGUF files, written with gguf's own writer from random models."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.15,
    "pad_token_id": 0,
}
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's 2026, isn't it? They'll pay 1234.50 for 77 cards.",
    "def total(values):\n    return sum(value * 2 for value in values) # 2\n\n\tprint(total([1, 22, 333]))",
    "SELECT COUNT(wins) FROM table WHERE team = 'Arsenal' AND year >= 1998;   ",
    "Ünïcödé text, 你好世界, здравствуйте, 😀 and more   blanks",
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: model_type -> llama.cpp's name of it.
ARCHITECTURES = {"gemma3_text": "gemma3"}


def byte_level_tokenizer(cut: Any | None = None, size: int = 400) -> Tokenizer:
    """A byte-level BPE trained on `TEXTS`; `cut` is what cuts words, GPT-2's rule by default."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = cut or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def tiny(model_type: str, vocabulary: int, **fields: Any) -> PreTrainedModel:
    """A random model in float32, its norms and biases random too."""
    config = AutoConfig.for_model(model_type, **{**COMMON, "vocab_size": vocabulary, **fields})
    model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    for name, value in model.named_parameters():
        if value.ndim == 1:
            value.copy_(
                torch.randn(value.shape) * 0.2 + (1.0 if "norm" in name and "gemma" not in model_type else 0)
            )
    return model


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    *,
    type_of: Callable[[str], Type] = lambda _: Type.F32,
    keys: Mapping[str, Any] | None = None,
    tokenizer_keys: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray[Any, Any]] | None = None,
    name: str | None = "Tiny Model",
    template: str | None = TEMPLATE,
) -> PreTrainedModel:
    """Write a model as llama.cpp's converter would; the model comes back with the values that the file has.

    Args:
        path: the file.
        model: one of `tiny`; its matrices are replaced by what their quantised form stands for.
        tokenizer: a byte-level BPE.
        type_of: transformers' name of a matrix -> its type in the file; vectors are F32.
        keys: more metadata of the architecture, by the part after its name; None leaves one out.
        tokenizer_keys: more of the tokenizer's, likewise.
        extra: more tensors.
        name: `general.name`.
        template: the chat template.
    """
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    if name is not None:
        writer.add_name(name)
    stated: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        **(keys or {}),
    }
    for key, value in stated.items():
        add_key(writer, f"{architecture}.{key}", value)
    add_tokenizer(writer, tokenizer, {"pre": "gpt-2", **(tokenizer_keys or {})})
    if template is not None:
        writer.add_chat_template(template)
    add_tensors(writer, model, architecture, type_of)
    for tensor, values in (extra or {}).items():
        writer.add_tensor(tensor, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, keys: Mapping[str, Any]) -> None:
    """Tokens, kinds and merges of a byte-level BPE, with `CONTROL` first."""
    described = tokenizer.get_vocab()
    tokens = sorted(described, key=lambda token: described[token])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in CONTROL else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges_of(tokenizer)])
    ids = {"bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 0, "add_bos_token": False}
    for key, value in {**ids, **keys}.items():
        add_key(writer, f"tokenizer.ggml.{key}", value)


def merges_of(tokenizer: Tokenizer) -> list[list[str]]:
    """The merges of a BPE, best first."""
    import json

    return [list(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One key of metadata, in the type that llama.cpp has for it; None adds nothing."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def add_tensors(
    writer: gguf.GGUFWriter, model: PreTrainedModel, architecture: str, type_of: Callable[[str], Type]
) -> None:
    """Every parameter under the name that gguf has for it, changed as llama.cpp's converter changes it."""
    kind = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    for parameter, value in dict(model.named_parameters()).items():
        tensor = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        assert tensor is not None, parameter
        array = value.detach().numpy().copy()
        order = interleaved(model, parameter) if architecture == "llama" else None
        if order is not None:
            array = array[order]
        if architecture.startswith("gemma") and parameter.endswith("norm.weight"):
            writer.add_tensor(tensor, array + 1)
            value.copy_(torch.from_numpy((array + 1) - 1))
            continue
        if array.ndim == 1:
            writer.add_tensor(tensor, array)
            continue
        chosen = type_of(parameter)
        raw = packed(array, chosen)
        writer.add_tensor(tensor, raw, raw_dtype=chosen)
        stored = torch.from_numpy(dequantize(raw, chosen)).reshape(array.shape)
        if order is not None:
            stored = torch.empty_like(stored).index_copy_(0, torch.from_numpy(order), stored)
        value.copy_(stored)


def interleaved(model: PreTrainedModel, parameter: str) -> np.ndarray[Any, Any] | None:
    """Which row of q or k stands at each place in a file of the Llama family."""
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    count = heads.get(parameter.split(".")[-2])
    if count is None:
        return None
    rows = np.arange(model.get_parameter(parameter).shape[0])
    return np.stack(np.split(rows.reshape(count, -1), 2, axis=1), axis=-1).reshape(-1)


def packed(array: np.ndarray[Any, Any], kind: Type) -> np.ndarray[Any, Any]:
    """A matrix in a type; of the two that gguf cannot make, random blocks of its shape."""
    if kind not in (Type.Q4_K, Type.Q6_K):
        return quantize(array, kind)
    block, width = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(
        0, 256, (*array.shape[:-1], array.shape[-1] // block, width), np.uint8
    )
    scale = np.array([1e-4], np.float16).view(np.uint8)
    for start in (0, 2) if kind is Type.Q4_K else (208,):
        blocks[..., start : start + 2] = scale
    return blocks.reshape(*array.shape[:-1], -1)


def logits(model: PreTrainedModel, seed: int = 0, length: int = 48) -> torch.Tensor:
    """Log-probabilities for a random prompt, longer than the sliding windows of the tests."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=generator)
    with torch.inference_mode():
        out: torch.Tensor = model(ids).logits[0].log_softmax(-1)
    return out
