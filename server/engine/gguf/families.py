"""The model families that are read from GGUF: the config of each, and what its tensors are called here.

llama.cpp stores a model under its own names and changes some of it: rotary rows of the Llama family are
interleaved, Gemma's norms have one added, scalings of the rotary frequencies are a tensor. What a file does
not state is llama.cpp's default for that architecture, which is what the file was made for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from loramux.server.engine.gguf.container import GgufError, GgufFile

_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_LLAMA = {**_ATTENTION, **_MLP, "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA2 = {
    **_ATTENTION,
    **_MLP,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3 = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
#: Tensors that the config states: factors of the rotary frequencies.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_LLAMA3_CONTEXT = 8192


class Keys:
    """The metadata of one architecture, by the part of the key after its name."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self._prefix = f"{file.architecture}."

    def get(self, name: str, default: Any = None) -> Any:
        """A value, or `default` where the file does not state it."""
        return self.file.metadata.get(self._prefix + name, default)

    def number(self, name: str, default: float | None = None) -> Any:
        """A number.

        Raises:
            GgufError: there is none, or one for each layer.
        """
        value = self.get(name, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if not isinstance(value, int | float):
            reason = "is missing" if value is None else "is not one number for all layers"
            raise GgufError(f"{self.file.path}: {self._prefix}{name} {reason}")
        return value


@dataclass(frozen=True, slots=True)
class Family:
    """How one architecture of llama.cpp becomes a model of transformers.

    Attributes:
        model_type: that of transformers.
        names: tensor of a layer -> module of a layer.
        fields: the fields of its config beside those that all share.
        interleaved: whether the rows of q and k were regrouped from halves to pairs for the rotary embedding.
        norm_offset: what was added to the weights of every norm.
    """

    model_type: str
    names: Mapping[str, str]
    fields: Callable[[Keys], dict[str, Any]]
    interleaved: bool = False
    norm_offset: float = 0.0


def family_of(file: GgufFile) -> Family:
    """The family of a file.

    Raises:
        GgufError: it is none of `FAMILIES`, or a mixture of experts, or one part of a model.
    """
    name = file.architecture
    if name not in FAMILIES:
        raise GgufError(f"{file.path}: architecture {name!r} is not read; these are: {', '.join(FAMILIES)}")
    if file.metadata.get(f"{name}.expert_count"):
        raise GgufError(f"{file.path}: a {name} with experts in its layers (expert_count) is not read")
    if (parts := file.metadata.get("split.count", 0)) > 1:
        raise GgufError(f"{file.path}: one of {parts} parts; join them first: llama-gguf-split --merge")
    return FAMILIES[name]


def config_of(file: GgufFile) -> PreTrainedConfig:
    """The config of the model in a file.

    Raises:
        GgufError: its family is not read, or a value is missing or means something that cannot be served.
    """
    family, keys = family_of(file), Keys(file)
    if "token_embd.weight" not in file.tensors:
        raise GgufError(f"{file.path}: it holds no token_embd.weight; is it a language model?")
    layers = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    if keys.number("block_count") != len(layers):
        raise GgufError(
            f"{file.path}: it holds {len(layers)} layers, not {keys.number('block_count')} (block_count)"
        )
    try:
        return AutoConfig.for_model(family.model_type, **_shared_fields(keys), **family.fields(keys))
    except GgufError:
        raise
    except (StrictDataclassError, ValueError, TypeError, KeyError, ArithmeticError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise GgufError(f"{file.path}: its metadata make no {family.model_type} model: {reason}") from None


def _shared_fields(keys: Keys) -> dict[str, Any]:
    """The fields that every config has."""
    file, head = keys.file, head_width(keys)
    if keys.number("attention.value_length", head) != head:
        raise GgufError(f"{file.path}: values and keys of different width are not read")
    heads = keys.number("attention.head_count")
    return {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": keys.number("embedding_length"),
        "intermediate_size": keys.number("feed_forward_length"),
        "num_hidden_layers": keys.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.number("attention.head_count_kv", heads),
        "max_position_embeddings": keys.number("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        # The class has those of one checkpoint; the file's own come with its tokenizer.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


def head_width(keys: Keys) -> int:
    """Width of one attention head."""
    width = keys.number("embedding_length") // max(keys.number("attention.head_count"), 1)
    return int(keys.number("attention.key_length", width))


def _rope(keys: Keys) -> dict[str, Any]:
    """`rope_parameters` for frequencies that are the same in every layer."""
    path = keys.file.path
    if keys.number("rope.dimension_count", head_width(keys)) != head_width(keys):
        raise GgufError(
            f"{path}: rotary embeddings on a part of a head are not read for {keys.file.architecture}"
        )
    theta = keys.number("rope.freq_base", 10000.0)
    if not theta > 0:
        raise GgufError(f"{path}: rope.freq_base is {theta}")
    if "rope_freqs.weight" in keys.file.tensors:
        return _llama3_rope(keys, theta)
    kind = keys.get("rope.scaling.type", "none")
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear"))
    if kind == "yarn":
        original = keys.number("rope.scaling.original_context_length")
        scaled = {
            "rope_type": "yarn",
            "factor": float(factor or 1.0),
            "original_max_position_embeddings": original,
        }
        for name in ("beta_fast", "beta_slow"):
            if (value := keys.get(f"rope.scaling.yarn_{name}")) is not None:
                scaled[name] = value
        return {**scaled, "rope_theta": theta}
    if kind not in ("none", "linear"):
        raise GgufError(f"{path}: rope.scaling.type {kind!r} is not read for {keys.file.architecture}")
    return {"rope_theta": theta, **_linear(factor)}


def _linear(factor: float | None) -> dict[str, Any]:
    """A scaling of all positions alike."""
    return (
        {"rope_type": "linear", "factor": float(factor)}
        if factor and factor != 1
        else {"rope_type": "default"}
    )


def _llama3_rope(keys: Keys, theta: float) -> dict[str, Any]:
    """The scaling of Llama 3.1 and later. The file has only its outcome, a divisor for each frequency, so the
    published constants are tried and the outcome is compared."""
    stored = _factors(keys.file, "rope_freqs.weight")
    wavelengths = 2 * math.pi * theta ** (np.arange(0, 2 * len(stored), 2) / (2 * len(stored)))
    factor, low, high = float(round(stored.max(), 3)), 1.0, 4.0
    original = keys.get("rope.scaling.original_context_length", _LLAMA3_CONTEXT)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    if 2 * len(stored) != head_width(keys) or not np.allclose(
        stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3
    ):
        raise GgufError(
            f"{keys.file.path}: rope_freqs.weight is not the scaling of Llama 3; no other is read"
        )
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _factors(file: GgufFile, name: str) -> npt.NDArray[np.float32]:
    """One number for each rotary frequency."""
    if name not in file.tensors or file.tensors[name].type is not GGMLQuantizationType.F32:
        raise GgufError(f"{file.path}: it has no {name} in F32")
    factors: npt.NDArray[np.float32] = file.bytes_of(name).view(np.float32)[0]
    return factors


def _llama(keys: Keys) -> dict[str, Any]:
    names = keys.file.tensors
    return {
        "head_dim": head_width(keys),
        "rope_parameters": _rope(keys),
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
    }


def _qwen2(keys: Keys) -> dict[str, Any]:
    return {"rope_parameters": _rope(keys), "use_sliding_window": False}


def _qwen3(keys: Keys) -> dict[str, Any]:
    bias = "blk.0.attn_q.bias" in keys.file.tensors
    return {**_qwen2(keys), "head_dim": head_width(keys), "attention_bias": bias}


def _gemma(keys: Keys) -> dict[str, Any]:
    return {"head_dim": head_width(keys), "rope_parameters": _rope(keys)}


def _query_scale(keys: Keys, large: int) -> dict[str, Any]:
    """Gemma's 27 B models, known by their number of layers, scale by the width a head would have had."""
    whole = keys.number("embedding_length") // keys.number("attention.head_count")
    return {"query_pre_attn_scalar": whole if keys.number("block_count") == large else head_width(keys)}


def _gemma2(keys: Keys) -> dict[str, Any]:
    return {
        **_gemma(keys),
        **_query_scale(keys, 46),
        "sliding_window": keys.number("attention.sliding_window", 4096),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
    }


def _gemma3(keys: Keys) -> dict[str, Any]:
    whole = _rope(keys)
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    layers, pattern = keys.number("block_count"), keys.get("attention.sliding_window_pattern", 6)
    slides = pattern if isinstance(pattern, list) else [(layer + 1) % pattern for layer in range(layers)]
    return {
        **_query_scale(keys, 62),
        "head_dim": head_width(keys),
        "sliding_window": keys.number("attention.sliding_window"),
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
        "rope_parameters": {"full_attention": whole, "sliding_attention": local},
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
    }


def _phi3(keys: Keys) -> dict[str, Any]:
    rotary = keys.number("rope.dimension_count", head_width(keys)) / head_width(keys)
    theta, context = keys.number("rope.freq_base", 10000.0), keys.number("context_length")
    rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": rotary}
    original = keys.number("rope.scaling.original_context_length", context)
    if "rope_factors_long.weight" in keys.file.tensors:
        long, short = (
            _factors(keys.file, f"rope_factors_{name}.weight").tolist() for name in ("long", "short")
        )
        rope |= {
            "rope_type": "longrope",
            "long_factor": long,
            "short_factor": short,
            "factor": context / original,
            "original_max_position_embeddings": original,
        }
        if (attention := keys.get("rope.scaling.attn_factor")) is not None:
            rope["attention_factor"] = attention
    return {
        "rope_parameters": rope,
        "original_max_position_embeddings": original,
        "sliding_window": keys.get("attention.sliding_window") or None,
    }


#: `general.architecture` -> family.
FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", _LLAMA, _llama, interleaved=True),
    "qwen2": Family("qwen2", _LLAMA, _qwen2),
    "qwen3": Family("qwen3", {**_LLAMA, **_HEAD_NORMS}, _qwen3),
    "gemma": Family("gemma", _LLAMA, _gemma, norm_offset=1.0),
    "gemma2": Family("gemma2", _GEMMA2, _gemma2, norm_offset=1.0),
    "gemma3": Family("gemma3_text", {**_GEMMA2, **_HEAD_NORMS}, _gemma3, norm_offset=1.0),
    "phi3": Family("phi3", _PHI3, _phi3),
}
