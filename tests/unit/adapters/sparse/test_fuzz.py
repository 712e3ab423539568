"""Whatever is done to a checkpoint, it reads to a whole model or is refused with an adapter error."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import AdapterError
from loramux.adapters.sparse.options import ReadOptions
from loramux.adapters.sparse.read import measure_sparse, read_sparse
from tests.sparse_kit import (
    in_old_layout,
    linear_tensors,
    loracoe_config,
    loracoe_tensors,
    mixlora_config,
    mixlora_tensors,
    original_loramoe_tensors,
    save,
)

TARGETS = ("q_proj", "up_proj")
SMALL = {"r": 2, "num_experts": 3, "lora_alpha": 4, "target_modules": list(TARGETS)}
FUZZ = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def checkpoints(base: BaseShapes) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    layout_3 = mixlora_tensors(base, TARGETS, experts=2)
    mixlora = mixlora_config(target_modules=list(TARGETS), num_experts=2)
    return [
        (layout_3, mixlora),
        (in_old_layout(layout_3, 1), {**mixlora, "routing_strategy": "switch"}),
        (linear_tensors("loramoe", base, TARGETS, attention=False), {"peft_type": "LORAMOE", **SMALL}),
        (linear_tensors("mola", base, TARGETS, attention=True), {"peft_type": "MOLA", **SMALL}),
        (original_loramoe_tensors(base, TARGETS), {"peft_type": "LORA", "lora_nums": 3, **SMALL}),
        (loracoe_tensors(base, TARGETS), loracoe_config()),
    ]


def damaged(data: st.DataObject, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One to three changes to names, shapes, types or values."""
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(tensors)))
        tensor = tensors[key]
        match data.draw(st.sampled_from(["drop", "rename", "splice", "resize", "retype", "value", "swap"])):
            case "drop" if len(tensors) > 1:
                del tensors[key]
            case "rename":
                tensors[data.draw(st.text("abAB019._ lorarouterweightxmdelps", min_size=1, max_size=60))] = (
                    tensor
                )
            case "splice":
                other = data.draw(st.sampled_from(sorted(tensors)))
                cut = data.draw(st.integers(0, min(len(key), len(other))))
                tensors[key[:cut] + other[cut:] + data.draw(st.sampled_from(["", ".weight", "0", ".0"]))] = (
                    tensor
                )
            case "resize":
                shape = data.draw(st.lists(st.integers(0, 7), max_size=3))
                tensors[key] = torch.randn(shape)
            case "retype":
                kinds = [torch.int64, torch.bool, torch.float64, torch.bfloat16, torch.complex64]
                real = tensor.real if tensor.is_complex() else tensor  # casting away a part is a warning
                tensors[key] = real.to(data.draw(st.sampled_from(kinds)))
            case "value" if tensor.numel():
                numbers = st.sampled_from([float("nan"), float("inf"), -1e30, 0.0])
                tensors[key].view(-1)[0] = data.draw(numbers) if tensor.is_floating_point() else 0
            case "swap":
                other = data.draw(st.sampled_from(sorted(tensors)))
                tensors[key], tensors[other] = tensors[other], tensors[key]
    return tensors


@FUZZ
@given(data=st.data())
def test_changed_tensors_are_refused_or_read_whole(
    base: BaseShapes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    tensors, config = data.draw(st.sampled_from(checkpoints(base)))
    folder = save(tmp_path_factory.getbasetemp() / "fuzz-tensors", damaged(data, tensors), config)
    _read(folder, base)


def values() -> st.SearchStrategy[Any]:
    leaves = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**30), 10**30),
        st.integers(-5, 5),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["mixlora", "switch", "rank", "ones", "LORACOE", "MIXLORA", "q_proj", "(a+)+", "["]),
    )
    return st.one_of(
        leaves,
        st.lists(leaves, max_size=3),
        st.dictionaries(st.sampled_from(["r", "lora_alpha", "use_dora", "q_proj", "x"]), leaves, max_size=3),
    )


NAMES = [
    *(
        "r",
        "lora_alpha",
        "num_experts",
        "lora_nums",
        "top_k",
        "top_p",
        "temperature",
        "target_modules",
        "bias",
    ),
    *("routing_strategy", "expert_lora", "expert_capacity", "use_dora", "use_rslora", "peft_type", "act_fn"),
    *("gate_gain", "router_bypass", "router_temperature", "phase", "task_type", "base_model_name_or_path"),
    *("modules_to_save", "sparse_step", "lora_dropout", "unheard_of"),
]


@FUZZ
@given(data=st.data(), fields=st.dictionaries(st.sampled_from(NAMES), values(), min_size=1, max_size=3))
def test_changed_configs_are_refused_or_read_whole(
    base: BaseShapes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, fields: dict[str, Any]
) -> None:
    tensors, config = data.draw(st.sampled_from(checkpoints(base)))
    folder = save(tmp_path_factory.getbasetemp() / "fuzz-fields", tensors, {**config, **fields})
    _read(folder, base)


@FUZZ
@given(data=st.data())
def test_changed_bytes_are_refused_or_read_whole(
    base: BaseShapes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = save(
        tmp_path_factory.getbasetemp() / "fuzz-bytes", loracoe_tensors(base, TARGETS), loracoe_config()
    )
    name = data.draw(st.sampled_from(["adapter_model.safetensors", "adapter_config.json"]))
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 3000) - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(content)
    _read(folder, base)


def _read(folder: Path, base: BaseShapes) -> None:
    try:
        model = read_sparse(
            folder, id="x", base=base, options=ReadOptions(any_base=True, allow_missing_dora=True)
        )
    except AdapterError as error:
        told = str(error)
        assert str(folder) in told or "base 'tiny'" in told
        return
    parts = [*model.plain.values(), *model.linear.values(), *model.ffn.values()]
    assert parts
    assert json.dumps(dict(model.summary))
    size = measure_sparse(folder, base=base, options=ReadOptions(any_base=True, allow_missing_dora=True))
    assert 0 < size.router_parameters < size.parameters or model.kind == "loracoe"
