"""What is not a plain LoRA of the base is refused, by the name of the field or tensor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loramux.adapters.errors import (
    AdapterError,
    AdapterFormatError,
    BaseMismatchError,
    UnsupportedAdapterError,
)
from loramux.adapters.peft_format import read_lora
from tests.peft_kit import A0, BASE, Q0, change_config, tensors, write_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

REFUSED_CONFIGS: list[tuple[dict[str, Any], type[AdapterError], str]] = [
    ({"peft_type": "LOHA"}, UnsupportedAdapterError, "peft_type is 'LOHA'"),
    ({"peft_type": None}, UnsupportedAdapterError, "peft_type is None"),
    ({"peft_type": "MIXLORA", "routing_strategy": "mixlora"}, UnsupportedAdapterError, "MixLoRA"),
    ({"use_dora": True}, UnsupportedAdapterError, "use_dora.*magnitude"),
    ({"bias": "some"}, AdapterFormatError, "bias is 'some'"),
    ({"use_mica": True}, UnsupportedAdapterError, "use_mica.*init_lora_weights"),
    ({"target_modules": None}, AdapterFormatError, "target_modules is null"),
    ({"layers_to_transform": [0]}, AdapterFormatError, "does not target: model.layers.1.*and 2 more"),
    ({"layers_to_transform": 1}, AdapterFormatError, "does not target: model.layers.0.*and 2 more"),
    ({"layers_to_transform": [0, 1], "layers_pattern": "h"}, AdapterFormatError, "does not target"),
    ({"layers_to_transform": ["0"]}, AdapterFormatError, "layers_to_transform must be layer numbers"),
    ({"layers_to_transform": [True]}, AdapterFormatError, "layers_to_transform must be layer numbers"),
    ({"layers_to_transform": 0, "layers_pattern": {"a": 1}}, AdapterFormatError, "layers_pattern must be"),
    ({"exclude_modules": ["k_proj"]}, AdapterFormatError, "does not target: .*k_proj, .*k_proj"),
    ({"lora_bias": True}, UnsupportedAdapterError, "lora_bias"),
    ({"modules_to_save": ["lm_head"]}, UnsupportedAdapterError, "modules_to_save"),
    ({"trainable_token_indices": [1, 2]}, UnsupportedAdapterError, "trainable_token_indices"),
    ({"layers_pattern": "layers"}, AdapterFormatError, "layers_pattern is set without layers_to_transform"),
    (
        {"target_modules": ".*_proj", "layers_to_transform": 1},
        AdapterFormatError,
        "layers_to_transform.*expr",
    ),
    ({"target_modules": ".*_proj", "layers_pattern": []}, AdapterFormatError, "layers_pattern.*expression"),
    ({"layer_replication": [[0, 2], [0, 2]]}, UnsupportedAdapterError, "layer_replication"),
    ({"target_parameters": ["mlp.experts"]}, UnsupportedAdapterError, "target_parameters"),
    ({"alora_invocation_tokens": [5]}, UnsupportedAdapterError, "alora_invocation_tokens"),
    ({"arrow_config": {"top_k": 2}}, UnsupportedAdapterError, "arrow_config"),
    ({"use_qalora": True}, UnsupportedAdapterError, "use_qalora"),
    ({"use_bdlora": {"nblocks": 2}}, UnsupportedAdapterError, "use_bdlora"),
    ({"kasa_config": {"beta": 1.0}}, UnsupportedAdapterError, "kasa_config"),
    ({"monteclora_config": {"num_samples": 2}}, UnsupportedAdapterError, "monteclora_config"),
    ({"velora_config": {"scale": 2.0}}, UnsupportedAdapterError, "velora_config"),
    ({"init_lora_weights": "pissa_niter_4"}, UnsupportedAdapterError, "init_lora_weights.*base weights"),
    ({"init_lora_weights": "olora"}, UnsupportedAdapterError, "init_lora_weights"),
    ({"lora_nums": 8}, UnsupportedAdapterError, "lora_nums.*LoRAMoE"),
    ({"num_experts": 4}, UnsupportedAdapterError, "num_experts"),
    ({"invented_in_2031": 0.5}, UnsupportedAdapterError, "unknown field 'invented_in_2031'"),
    ({"base_model_name_or_path": "other/base"}, BaseMismatchError, "other/base.*tiny"),
    ({"r": 8}, AdapterFormatError, "rank 4, but its config says 8"),
    ({"r": 0}, AdapterFormatError, "rank 'r'"),
    ({"r": "4"}, AdapterFormatError, "rank 'r'"),
    ({"r": True}, AdapterFormatError, "rank 'r'"),
    ({"lora_alpha": float("nan")}, AdapterFormatError, "lora_alpha"),
    ({"lora_alpha": 10**400}, AdapterFormatError, "lora_alpha"),
    ({"lora_alpha": None}, AdapterFormatError, "lora_alpha"),
    ({"lora_alpha": 0}, AdapterFormatError, "delta W is zero"),
    ({"use_rslora": "yes"}, AdapterFormatError, "use_rslora"),
    ({"rank_pattern": {"q_proj": 5}}, AdapterFormatError, "q_proj.* rank 4, but its config says 5"),
    ({"rank_pattern": {"(": 5}}, AdapterFormatError, "rank_pattern.*no regular expression"),
    ({"rank_pattern": {"(m+)+x": 5}}, AdapterFormatError, "rank_pattern.*repeats a group"),
    ({"alpha_pattern": {"(m|m)*x": 5}}, AdapterFormatError, "alpha_pattern.*repeats a group"),
    ({"target_modules": "(m+){2,}x"}, AdapterFormatError, "target_modules.*repeats a group"),
    ({"rank_pattern": {"q" * 2000: 5}}, AdapterFormatError, "over 1000 characters"),
    ({"rank_pattern": [5]}, AdapterFormatError, "rank_pattern must be an object"),
    ({"alpha_pattern": {"q_proj": "a"}}, AdapterFormatError, r"alpha_pattern\[q_proj\]"),
    ({"target_modules": ["q_proj"]}, AdapterFormatError, "does not target.*and 7 more"),
    ({"target_modules": 7}, AdapterFormatError, "target_modules"),
    ({"target_modules": "("}, AdapterFormatError, "no regular expression"),
]


@pytest.mark.parametrize(
    ("fields", "error", "message"), REFUSED_CONFIGS, ids=[str(c[0]) for c in REFUSED_CONFIGS]
)
def test_a_config_that_cannot_be_served_is_refused_by_field(
    saved: Path, fields: dict[str, Any], error: type[AdapterError], message: str
) -> None:
    change_config(saved, **fields)
    with pytest.raises(error, match=message) as caught:
        read_lora(saved, id="x", base=BASE)
    assert str(saved) in str(caught.value)


def _without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda values: {key: value for key, value in values.items() if part not in key}


def _with(**added: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda values: {**values, **{key.replace("__", "."): value for key, value in added.items()}}


def _set(key: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda values: {**values, key: value(values[key])}


def _nan(value: Tensor) -> Tensor:
    value[1, 2] = float("nan")
    return value


ONE = torch.ones(2, 2)
REFUSED_TENSORS: dict[str, tuple[Callable[..., dict[str, Tensor]], type[AdapterError], str]] = {
    "no B": (_without(f"{Q0}.lora_B"), AdapterFormatError, "layers.0.self_attn.q_proj has no lora_B"),
    "no A": (_without(f"{Q0}.lora_A"), AdapterFormatError, "layers.0.self_attn.q_proj has no lora_A"),
    "module lost": (_without("layers.1.mlp.up_proj"), AdapterFormatError, "without tensors: .*1.mlp.up_proj"),
    "nothing": (lambda _: {}, BaseMismatchError, "no module of base 'tiny'"),
    "other layout": (
        lambda values: {k.replace("self_attn", "attention"): v for k, v in values.items() if "attn" in k},
        BaseMismatchError,
        "no module of base 'tiny' matches; found model.layers.0.attention.k_proj.*and 3 more",
    ),
    "too many layers": (
        lambda values: {
            **values,
            **{k.replace("layers.1", "layers.7"): v.clone() for k, v in values.items()},
        },
        BaseMismatchError,
        "has no linear module model.layers.7.*and 2 more",
    ),
    "nan": (_set(A0, _nan), AdapterFormatError, "q_proj.lora_A.weight holds NaN"),
    "infinity": (_set(A0, lambda v: v / 0), AdapterFormatError, "holds NaN or infinity"),
    "transposed": (_set(A0, lambda v: v.T.contiguous()), BaseMismatchError, r"shape \[24, 4\].*\[4, 24\]"),
    "three dimensions": (_set(A0, lambda v: v[None]), BaseMismatchError, "shape"),
    "wrong rank": (_set(A0, lambda v: v[:3].clone()), AdapterFormatError, "rank 3, but its config says 4"),
    "integers": (_set(A0, lambda v: v.to(torch.int8)), AdapterFormatError, "is I8"),
    "zero B": (
        lambda values: {k: v * 0 if "lora_B" in k else v for k, v in values.items()},
        AdapterFormatError,
        "delta W is zero",
    ),
    "zero A": (
        lambda values: {k: v * 0 if "lora_A" in k else v for k, v in values.items()},
        AdapterFormatError,
        "delta W is zero",
    ),
    "dora": (_with(**{f"{Q0}.lora_magnitude_vector": ONE}), UnsupportedAdapterError, "DoRA magnitude"),
    "factor bias": (_with(**{f"{Q0}.lora_B.bias": ONE}), UnsupportedAdapterError, "bias on a LoRA factor"),
    "base bias": (_with(**{f"{Q0}.bias": ONE}), UnsupportedAdapterError, "trained bias"),
    "embedding": (
        _with(base_model__model__model__embed_tokens__lora_embedding_A=ONE),
        UnsupportedAdapterError,
        "adapts an embedding",
    ),
    "saved head": (
        _with(base_model__model__lm_head__weight=ONE),
        UnsupportedAdapterError,
        "weight of the base",
    ),
    "loramoe": (_with(**{f"{Q0}.lora_A0.weight": ONE}), UnsupportedAdapterError, "LoRAMoE"),
    "loramoe route": (_with(**{f"{Q0}.lora_route.weight": ONE}), UnsupportedAdapterError, "LoRAMoE"),
    "loracoe": (_with(**{f"{Q0}.lora_router.weight": ONE}), UnsupportedAdapterError, "LoRACoE"),
    "mixlora": (_with(mixlora__layers__0__mlp__moe_gate__weight=ONE), UnsupportedAdapterError, "MixLoRA"),
    "stray": (_with(optimizer_state=ONE), UnsupportedAdapterError, "optimizer_state.*no LoRA factor"),
    "both spellings": (
        _with(**{f"{Q0}.lora_A.default.weight": ONE}),
        AdapterFormatError,
        "both .* are given",
    ),
    "two adapters": (
        lambda values: {
            k.replace(".weight", ".b.weight") if "q_proj" in k else k: v for k, v in values.items()
        },
        AdapterFormatError,
        "several adapters",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED_TENSORS.values(), ids=REFUSED_TENSORS.keys())
def test_tensors_that_do_not_fit_are_refused_by_name(
    saved: Path, change: Callable[..., dict[str, Tensor]], error: type[AdapterError], message: str
) -> None:
    write_tensors(saved, change(tensors(saved)))
    with pytest.raises(error, match=message) as caught:
        read_lora(saved, id="x", base=BASE)
    assert str(saved) in str(caught.value)


def test_a_value_beyond_the_asked_for_dtype_is_refused(saved: Path) -> None:
    write_tensors(saved, _set(A0, lambda v: v + 1e6)(tensors(saved)))
    read_lora(saved, id="x", base=BASE)
    with pytest.raises(AdapterFormatError, match=r"infinity after conversion to torch\.float16"):
        read_lora(saved, id="x", base=BASE, dtype=torch.float16)
