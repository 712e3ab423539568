"""Random adapters that PEFT writes, and what may happen to them on the way to a server."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.peft_kit import SEVEN, change_config, lora_config, tensors, write_tensors

LAYERS = 3
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def three_layers(*, biases: bool) -> LlamaForCausalLM:
    """The base of all examples: as small as a Llama can be that still has layers to choose among."""
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=32,
        initializer_range=0.2,
        attention_bias=biases,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


SUFFIXES = (*SEVEN, "self_attn.q_proj", "mlp.up_proj", "1.mlp.down_proj", "layers.2.self_attn.v_proj")
PATHS = tuple(
    f"model.layers.{layer}.{part}"
    for layer in range(LAYERS)
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj")
)
EXPRESSIONS = (
    r".*_proj",
    r".*\.(q|k)_proj",
    r"model\.layers\.[01]\.self_attn\..*_proj",
    r".*layers\.2\..*(up|down)_proj",
    r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
)
PATTERNS = (
    *SEVEN,
    r"layers\.1\..*",
    "self_attn.q_proj",
    "(q|k)_proj",
    ".*_proj",
    PATHS[0],
    f"^{PATHS[0]}",
    "proj",
)


def _names(least: int) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(SUFFIXES + PATHS), min_size=least, max_size=5, unique=True)


def _sometimes(choice: st.SearchStrategy[Any], default: Any) -> st.SearchStrategy[Any]:
    return st.one_of(st.just(default), choice)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a LoraConfig, of the kinds that decide where and how strongly an adapter works."""
    listed = draw(st.booleans() | st.just(True))
    targets: Any = draw(_names(1) if listed else st.sampled_from((*EXPRESSIONS, "all-linear")))
    fields: dict[str, Any] = {
        "target_modules": targets,
        "r": draw(st.integers(1, 6)),
        "lora_alpha": draw(st.sampled_from((1, 3, 8, 2.5, -4))),
        "use_rslora": draw(st.booleans()),
        "bias": draw(st.sampled_from(("none", "none", "all", "lora_only"))),
        "exclude_modules": draw(_sometimes(_names(0) | st.sampled_from(EXPRESSIONS[1:]), None)),
        "rank_pattern": draw(st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 6), max_size=2)),
        "alpha_pattern": draw(
            st.dictionaries(st.sampled_from(PATTERNS), st.sampled_from((1, 5, 0.5)), max_size=2)
        ),
        "init_lora_weights": draw(st.sampled_from((True, False, "gaussian"))),
    }
    if listed:
        number = st.integers(0, LAYERS)
        layers = draw(_sometimes(number | st.lists(number, max_size=3), None))
        fields["layers_to_transform"] = layers
        if layers is not None:
            fields["layers_pattern"] = draw(
                st.sampled_from((None, "", [], "layers", ["layers"], ["h", "layers"], "h"))
            )
    return fields


def write_with_peft(
    directory: Path, model: LlamaForCausalLM, fields: dict[str, Any], dtype: torch.dtype
) -> None:
    """Save an adapter with random factors; raises what PEFT raises when it matches nothing."""
    wrapped = get_peft_model(model, lora_config(**fields))
    for layer in wrapped.modules():
        if isinstance(layer, LoraLayer):
            for half in (*layer.lora_A.values(), *layer.lora_B.values()):
                torch.nn.init.normal_(half.weight, std=0.3)
    wrapped.save_pretrained(directory)
    write_tensors(directory, {key: value.to(dtype) for key, value in tensors(directory).items()})


Values = dict[str, Tensor]


@dataclass(frozen=True)
class Damage:
    """One thing done to a saved adapter.

    Attributes:
        what: for the message of a failing example.
        culprits: the refusal must name one of these; empty where loading may be right.
    """

    what: str
    culprits: tuple[str, ...] = ()


def _module(key: str) -> str:
    return key.removeprefix("base_model.model.").split(".lora_")[0]


def _less(values: Values, key: str, _: int) -> tuple[str, ...]:
    del values[key]
    return (_module(key), "no module of base")


def _lose_module(values: Values, key: str, _: int) -> tuple[str, ...]:
    for side in "AB":
        values.pop(f"base_model.model.{_module(key)}.lora_{side}.weight", None)
    return (_module(key), "no module of base")


def _to_other_module(values: Values, key: str, pick: int) -> tuple[str, ...]:
    """The factors of a module, copied to the same kind of module in another layer, existing or not."""
    module = _module(key)
    layer = module.split(".")[2]
    other = module.replace(f"layers.{layer}.", f"layers.{pick % (LAYERS + 2)}.")
    for side in "AB":
        value = values.get(f"base_model.model.{module}.lora_{side}.weight")
        if value is not None:
            values.setdefault(f"base_model.model.{other}.lora_{side}.weight", value.clone())
    return ()


def _extra(values: Values, _: str, pick: int) -> tuple[str, ...]:
    name = (
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.lm_head.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.bias",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias",
        "something",
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.lora_A.weight",
    )[pick % 8]
    values[name] = torch.full((2, 16), 0.5)
    return (name, _module(name))


def _renamed(values: Values, key: str, pick: int) -> tuple[str, ...]:
    new = (
        key.removeprefix("base_model.model."),
        f"module.{key}",
        key.replace("model.model.", "model."),
        key.replace("lora_A", "lora_C").replace("lora_B", "lora_C"),
        key.replace(".weight", ".default.weight"),
        key.replace(".weight", ".other.weight"),
        key.replace("lora_A", "lora_X").replace("lora_B", "lora_A").replace("lora_X", "lora_B"),
        key.upper(),
    )[pick % 8]
    values[new] = values.pop(key)
    return ()


def _all_renamed(values: Values, _: str, pick: int) -> tuple[str, ...]:
    """Not among them: the adapter's name in every key, which is read on purpose. PEFT ignores it."""
    change: Callable[[str], str] = (
        lambda key: key.removeprefix("base_model.model."),
        lambda key: f"module.{key}",
        lambda key: f"base_model.model.{key}",
        lambda key: key.replace("model.model.model.", "model.model.language_model."),
    )[pick % 4]
    renamed = {change(key): value for key, value in values.items()}
    values.clear()
    values.update(renamed)
    return ()


def _transposed(values: Values, key: str, _: int) -> tuple[str, ...]:
    # A square factor is as good transposed as not: nothing can tell.
    values[key] = values[key].T.contiguous()
    return ()


def _other_type(values: Values, key: str, pick: int) -> tuple[str, ...]:
    kinds = (torch.float64, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.bool)
    values[key] = values[key].to(kinds[pick % len(kinds)])
    return ()


def _smaller(values: Values, key: str, _: int) -> tuple[str, ...]:
    values[key] = values[key][:-1].clone()
    return (_module(key), key)


_TENSOR_DAMAGES = (
    _less,
    _lose_module,
    _to_other_module,
    _extra,
    _renamed,
    _all_renamed,
    _transposed,
    _other_type,
    _smaller,
)


@st.composite
def field_changes(draw: st.DrawFn) -> dict[str, Any]:
    """Config fields rewritten behind the back of the tensors."""
    number = st.integers(0, LAYERS)
    changes: dict[str, st.SearchStrategy[Any]] = {
        "layers_to_transform": st.none() | number | st.lists(number, max_size=3),
        "layers_pattern": st.sampled_from((None, "", [], "layers", ["h", "layers"], "h")),
        "target_modules": st.sampled_from((None, "all-linear", [], "", *EXPRESSIONS)) | _names(1),
        "exclude_modules": st.sampled_from((None, "", [], *EXPRESSIONS)) | _names(1),
        "r": st.integers(1, 6),
        "lora_alpha": st.sampled_from((0, 1, 7, 1.5, -2)),
        "use_rslora": st.sampled_from((True, False, None)),
        "rank_pattern": st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 6), max_size=2),
        "alpha_pattern": st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 9), max_size=2),
        "bias": st.sampled_from(("none", "all", "lora_only")),
        "fan_in_fan_out": st.booleans(),
        "ensure_weight_tying": st.booleans(),
        "modules_to_save": st.sampled_from((None, [], ["lm_head"], ["q_proj"])),
        "init_lora_weights": st.sampled_from((True, False, None, "gaussian", "pissa", "olora")),
        "use_mica": st.booleans(),
        "use_dora": st.booleans(),
        "lora_bias": st.booleans(),
        "qalora_group_size": st.sampled_from((1, 16)),
        "layer_replication": st.sampled_from((None, [], [[0, 2], [1, 3]])),
        "trainable_token_indices": st.sampled_from((None, [1])),
        "target_parameters": st.sampled_from((None, [], ["mlp.up_proj.weight"])),
        "megatron_core": st.sampled_from((None, "megatron.core")),
    }
    chosen = draw(st.lists(st.sampled_from(sorted(changes)), min_size=1, max_size=2, unique=True))
    return {name: draw(changes[name]) for name in chosen}


def damage_tensors(directory: Path, which: int, pick: int) -> Damage:
    values = tensors(directory)
    factors = sorted(key for key in values if ".lora_" in key)
    act = _TENSOR_DAMAGES[which % len(_TENSOR_DAMAGES)]
    key = factors[pick % len(factors)]
    culprits = act(values, key, pick // 7)
    write_tensors(directory, values)
    return Damage(f"{act.__name__.lstrip('_')} {key} ({pick})", culprits)


def damage_config(directory: Path, changes: dict[str, Any]) -> Damage:
    change_config(directory, **changes)
    return Damage(f"config {json.dumps(changes)}")
