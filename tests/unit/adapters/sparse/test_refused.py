"""What is damaged, contradictory or of no known kind is refused whole, by the name of the tensor or field."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterPathError,
    BaseMismatchError,
    UnsupportedAdapterError,
)
from loramux.adapters.sparse.read import measure_sparse, read_sparse
from tests.peft_kit import SEVEN
from tests.sparse_kit import (
    base_shapes,
    linear_tensors,
    mixlora_config,
    mixlora_tensors,
    pair,
    save,
    small_config,
)

GATE = "mixlora.layers.1.mlp.moe_gate.weight"
A = "mixlora.layers.1.mlp.up_proj.experts.2.lora_A.weight"
B = "mixlora.layers.1.mlp.up_proj.experts.2.lora_B.weight"
Q = "mixlora.layers.0.self_attn.q_proj.lora_A.weight"
Damage = Callable[[dict[str, Tensor]], object]

FIELDS: list[tuple[dict[str, Any], type[AdapterError], str]] = [
    ({"routing_strategy": "round-robin"}, UnsupportedAdapterError, "routing_strategy is 'round-robin'"),
    ({"routing_strategy": None}, UnsupportedAdapterError, "routing_strategy is None"),
    ({"routing_strategy": ["mixlora"]}, UnsupportedAdapterError, "routing_strategy"),
    ({"num_experts": 0}, AdapterFormatError, "num_experts must be a whole number from 1"),
    ({"num_experts": -8}, AdapterFormatError, "num_experts.*got -8"),
    ({"num_experts": 8.0}, AdapterFormatError, r"num_experts.*got 8\.0"),
    ({"num_experts": True}, AdapterFormatError, "num_experts"),
    ({"num_experts": 10**9}, AdapterFormatError, "num_experts"),
    ({"num_experts": 10**4000}, AdapterFormatError, "num_experts.*of 13288 bits"),
    ({"num_experts": 5}, AdapterFormatError, "moe_gate.weight has 4 rows .*experts.*says 5"),
    ({"num_experts": 3}, AdapterFormatError, "moe_gate.weight has 4 rows .*experts.*says 3"),
    ({"top_k": 5}, AdapterFormatError, "top_k must be a whole number from 1 to 4, got 5"),
    ({"top_k": 0}, AdapterFormatError, "top_k"),
    ({"r": 4}, AdapterFormatError, "has 3 rows or columns for rank, but its config says 4"),
    ({"r": -3}, AdapterFormatError, "r must be"),
    ({"r": None}, AdapterFormatError, "r must be .*missing"),
    ({"r": "3"}, AdapterFormatError, "r must be .*'3'"),
    ({"lora_alpha": 0}, AdapterFormatError, "lora_alpha must be a number above 0"),
    ({"lora_alpha": -16}, AdapterFormatError, "lora_alpha"),
    ({"lora_alpha": float("nan")}, AdapterFormatError, "lora_alpha"),
    ({"lora_alpha": float("inf")}, AdapterFormatError, "lora_alpha"),
    ({"lora_alpha": 1e300}, AdapterFormatError, "lora_alpha"),
    ({"lora_alpha": 10**400}, AdapterFormatError, "lora_alpha"),
    ({"use_rslora": "yes"}, AdapterFormatError, "use_rslora must be true or false"),
    ({"use_dora": 1}, AdapterFormatError, "use_dora must be true or false"),
    ({"bias": "all"}, UnsupportedAdapterError, "bias is 'all'"),
    ({"modules_to_save": ["lm_head"]}, UnsupportedAdapterError, "modules_to_save.*whole modules"),
    ({"invented_in_2031": 0.5}, UnsupportedAdapterError, "unknown field 'invented_in_2031'"),
    ({"expert_lora": 5}, AdapterFormatError, "expert_lora must be an object"),
    ({"expert_lora": {"r": 7}}, AdapterFormatError, "has 3 rows or columns for rank.*says 7"),
    ({"expert_lora": {"invented": 1}}, UnsupportedAdapterError, "unknown field 'invented'"),
    ({"target_modules": []}, AdapterFormatError, "target_modules must name"),
    ({"target_modules": None}, AdapterFormatError, "target_modules must name"),
    ({"target_modules": "all-linear"}, AdapterFormatError, "must be names"),
    ({"target_modules": {"q_proj": "yes"}}, AdapterFormatError, "must hold true or false"),
    ({"target_modules": [1]}, AdapterFormatError, "target_modules"),
    ({"target_modules": ["q_proj"]}, BaseMismatchError, "could have experts"),
    ({"target_modules": list(SEVEN[:-1])}, AdapterFormatError, "down_proj.*does not target"),
    ({"peft_type": "MOLA"}, AdapterFormatError, "peft_type is 'MOLA', but the tensors.*are MixLoRA"),
    ({"peft_type": "LORA"}, AdapterFormatError, "peft_type is 'LORA'"),
    ({"peft_type": "XLORA"}, UnsupportedAdapterError, "X-LoRA.*4-bit"),
    ({"task_type": "SEQ_CLS"}, UnsupportedAdapterError, "SEQ_CLS.*classifies"),
]


@pytest.mark.parametrize(("fields", "error", "message"), FIELDS, ids=[str(case[0])[:60] for case in FIELDS])
def test_a_field_that_cannot_be_served_is_named(
    base: BaseShapes, tmp_path: Path, fields: dict[str, Any], error: type[AdapterError], message: str
) -> None:
    save(tmp_path, mixlora_tensors(base), mixlora_config(**fields))
    with pytest.raises(error, match=message) as caught:
        read_sparse(tmp_path, id="x", base=base)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(error, match=message):
        measure_sparse(tmp_path, base=base)


@pytest.mark.parametrize(
    ("strategy", "fields", "message"),
    [
        ("mixlora-dynamic", {"top_p": 0.0}, "top_p must be a number above 0 and at most 1"),
        ("mixlora-dynamic", {"top_p": 1.5}, "top_p"),
        ("mixlora-dynamic", {"temperature": -1.0}, "temperature must be a number at least 0"),
        ("mixlora-switch", {"expert_capacity": 0}, "expert_capacity"),
        ("mixlora-switch", {"expert_capacity": 10**12}, "expert_capacity"),
    ],
)
def test_the_parameters_of_every_router_are_checked(
    base: BaseShapes, tmp_path: Path, strategy: str, fields: dict[str, Any], message: str
) -> None:
    save(tmp_path, mixlora_tensors(base), mixlora_config(routing_strategy=strategy, **fields))
    with pytest.raises(AdapterFormatError, match=message):
        read_sparse(tmp_path, id="x", base=base)


def transpose(key: str) -> Damage:
    return lambda tensors: tensors.update({key: tensors[key].T.contiguous()})


def spoil(key: str, value: float) -> Damage:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[key].view(-1)[-1] = value

    return damage


TENSORS: list[tuple[str, Damage, type[AdapterError], str]] = [
    ("a gate is missing", lambda t: t.pop(GATE), AdapterFormatError, f"without tensors: {GATE}"),
    ("a factor is missing", lambda t: t.pop(B), AdapterFormatError, f"without tensors: {B}"),
    ("attention is missing", lambda t: t.pop(Q), AdapterFormatError, f"without tensors: {Q}"),
    ("A is transposed", transpose(A), AdapterFormatError, f"{A} is transposed"),
    ("B is transposed", transpose(B), AdapterFormatError, f"{B} is transposed"),
    ("the gate is transposed", transpose(GATE), AdapterFormatError, f"{GATE} is transposed"),
    ("NaN in A", spoil(A, float("nan")), AdapterFormatError, f"{A} holds NaN"),
    ("infinity in B", spoil(B, float("-inf")), AdapterFormatError, f"{B} holds NaN or infinity"),
    ("NaN in a gate", spoil(GATE, float("nan")), AdapterFormatError, f"{GATE} holds NaN"),
    (
        "more experts than the gate",
        lambda t: t.update(pair("mixlora.layers.1.mlp.up_proj.experts.4", (40, 24), 3)),
        AdapterFormatError,
        "experts.4.* of expert 4, but its gate and its config know 4 experts, 0 to 3",
    ),
    (
        "a gate with too many rows",
        lambda t: t.update({GATE: torch.randn(5, 24)}),
        AdapterFormatError,
        f"{GATE} has 5 rows",
    ),
    (
        "one expert of another rank",
        lambda t: t.update(pair("mixlora.layers.1.mlp.up_proj.experts.2", (40, 24), 5)),
        AdapterFormatError,
        "experts.2.lora_A.weight has 5 rows or columns for rank, but its config says 3",
    ),
    (
        "another hidden size",
        lambda t: t.update({A: torch.randn(3, 25)}),
        BaseMismatchError,
        f"{A} has shape \\[3, 25\\], but base 'tiny' and its config need \\[3, 24\\]",
    ),
    ("a number", lambda t: t.update({A: torch.randn(())}), BaseMismatchError, f"{A} has shape \\[\\]"),
    ("integers", lambda t: t.update({A: t[A].to(torch.int8)}), AdapterFormatError, f"{A} is I8"),
    (
        "a layer too many",
        lambda t: t.update(pair("mixlora.layers.2.self_attn.q_proj", (30, 24), 3)),
        BaseMismatchError,
        "has no linear module model.layers.2.self_attn.q_proj",
    ),
    (
        "experts in attention",
        lambda t: t.update(pair("mixlora.layers.0.self_attn.q_proj.experts.0", (30, 24), 3)),
        AdapterFormatError,
        "q_proj.experts.0.lora_A.weight has no place",
    ),
    (
        "a gate on a projection",
        lambda t: t.update({"mixlora.layers.0.mlp.up_proj.moe_gate.weight": torch.randn(4, 24)}),
        AdapterFormatError,
        "up_proj.moe_gate.weight has no place",
    ),
    (
        "a key with a bias",
        lambda t: t.update({"mixlora.layers.0.mlp.moe_gate.bias": torch.randn(4)}),
        UnsupportedAdapterError,
        "moe_gate.bias",
    ),
    (
        "a classifier",
        lambda t: t.update({"classifier": torch.randn(2, 24)}),
        UnsupportedAdapterError,
        "classifier.*SEQ_CLS",
    ),
    (
        "a DoRA magnitude",
        lambda t: t.update({"mixlora.layers.0.self_attn.q_proj.magnitude_vector_": torch.randn(30)}),
        UnsupportedAdapterError,
        "magnitude_vector_.*DoRA",
    ),
    (
        "another container",
        lambda t: t.update({"mola.layers.0.mlp.up_proj.moe_gate.weight": torch.randn(4, 24)}),
        AdapterFormatError,
        "several containers",
    ),
    (
        "zero deltas",
        lambda t: [tensor.zero_() for key, tensor in t.items() if "lora_B" in key],
        AdapterFormatError,
        "delta W is zero in every module",
    ),
]


@pytest.mark.parametrize(
    ("damage", "error", "message"), [case[1:] for case in TENSORS], ids=[case[0] for case in TENSORS]
)
def test_a_tensor_that_is_wrong_is_named_and_nothing_is_loaded(
    base: BaseShapes, tmp_path: Path, damage: Damage, error: type[AdapterError], message: str
) -> None:
    tensors = mixlora_tensors(base)
    damage(tensors)
    save(tmp_path, tensors, mixlora_config())
    with pytest.raises(error, match=message) as caught:
        read_sparse(tmp_path, id="x", base=base)
    assert str(tmp_path / "adapter_model.safetensors") in str(caught.value)


def test_a_value_that_does_not_fit_the_asked_type_is_refused(base: BaseShapes, tmp_path: Path) -> None:
    tensors = mixlora_tensors(base)
    tensors[A][0, 0] = 1e6
    save(tmp_path, tensors, mixlora_config())
    read_sparse(tmp_path, id="x", base=base, dtype=torch.bfloat16)
    with pytest.raises(AdapterFormatError, match=r"infinity after conversion to torch.float16"):
        read_sparse(tmp_path, id="x", base=base, dtype=torch.float16)


def test_a_truncated_file_is_refused_at_every_length(base: BaseShapes, tmp_path: Path) -> None:
    path = save(tmp_path, mixlora_tensors(base), mixlora_config()) / "adapter_model.safetensors"
    whole = path.read_bytes()
    lengths = {0, 1, 8, 9, len(whole) // 2, len(whole) - 1, *torch.randint(0, len(whole), (10,)).tolist()}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        with pytest.raises(AdapterFormatError, match="not a readable safetensors file"):
            read_sparse(tmp_path, id="x", base=base)


OTHERS: list[tuple[str, dict[str, Tensor], dict[str, Any], type[AdapterError], str]] = [
    (
        "x-lora",
        {"internal_xlora_classifier.last.weight": torch.ones(4, 4)},
        {"peft_type": "XLORA"},
        UnsupportedAdapterError,
        "internal_xlora_classifier.last.weight.*X-LoRA.*experts of a pool",
    ),
    (
        "plain lora",
        pair("base_model.model.model.layers.0.self_attn.q_proj", (30, 24), 3),
        {"peft_type": "LORA", "r": 3, "lora_alpha": 3},
        UnsupportedAdapterError,
        "plain LoRA; add it to the pool",
    ),
    (
        "a whole model",
        {"model.embed_tokens.weight": torch.ones(4, 4)},
        {},
        UnsupportedAdapterError,
        "model.embed_tokens.weight belongs to no mixture",
    ),
    ("nothing", {}, {}, AdapterFormatError, "holds no tensors"),
]


@pytest.mark.parametrize(
    ("tensors", "config", "error", "message"), [case[1:] for case in OTHERS], ids=[case[0] for case in OTHERS]
)
def test_what_is_no_mixture_is_refused_with_the_reason(
    base: BaseShapes,
    tmp_path: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    error: type[AdapterError],
    message: str,
) -> None:
    save(tmp_path, tensors, config)
    with pytest.raises(error, match=message):
        read_sparse(tmp_path, id="x", base=base)


def test_missing_files_pickles_and_paths_that_lead_out(base: BaseShapes, tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match="no such directory"):
        read_sparse(tmp_path / "nowhere", id="x", base=base)
    folder = save(tmp_path / "in", mixlora_tensors(base), mixlora_config())
    tensors = folder / "adapter_model.safetensors"
    tensors.rename(tmp_path / "outside.safetensors")
    with pytest.raises(AdapterFormatError, match=r"adapter_model.safetensors is missing"):
        read_sparse(folder, id="x", base=base)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsupportedAdapterError, match=r"loramux convert"):
        read_sparse(folder, id="x", base=base)
    os.symlink(tmp_path / "outside.safetensors", tensors)
    with pytest.raises(AdapterPathError, match="outside the allowed directory"):
        read_sparse(folder, id="x", base=base)
    assert read_sparse(folder, id="x", base=base, root=tmp_path).ffn


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "null", '{"r": NaN', "{}", '{"r": ' + "9" * 5000 + "}", "[" * 100_000]
)
def test_a_config_that_is_no_object_is_refused(base: BaseShapes, tmp_path: Path, text: str) -> None:
    save(tmp_path, mixlora_tensors(base), mixlora_config())
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        read_sparse(tmp_path, id="x", base=base)


def test_a_base_whose_feed_forward_block_is_unknown_is_refused(tmp_path: Path) -> None:
    modules = dict(base_shapes(small_config()).modules)
    strange = BaseShapes(
        "tiny", {path.replace("up_proj", "upward"): shape for path, shape in modules.items()}
    )
    save(tmp_path, mixlora_tensors(base_shapes(small_config())), mixlora_config())
    with pytest.raises(UnsupportedAdapterError, match=r"linear modules down_proj, gate_proj, upward"):
        read_sparse(tmp_path, id="x", base=strange)
    with pytest.raises(BaseMismatchError, match=r"one stack of layers"):
        read_sparse(tmp_path, id="x", base=BaseShapes("tiny", {"wte": (3, 3)}))


def test_mola_with_a_gate_short_of_a_row_is_refused_by_the_gate(base: BaseShapes, tmp_path: Path) -> None:
    tensors = linear_tensors("mola", base, ("q_proj",), attention=True)
    key = "mola.layers.1.self_attn.q_proj.moe_gate.weight"
    tensors[key] = tensors[key][:2].contiguous()
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "num_experts": 3, "peft_type": "MOLA"}
    save(tmp_path, tensors, config)
    with pytest.raises(AdapterFormatError, match=f"{key} has 2 rows"):
        read_sparse(tmp_path, id="x", base=base)
