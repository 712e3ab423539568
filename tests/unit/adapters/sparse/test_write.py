"""What is written reads back as the same model, and is what upstream programs look for."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import AdapterFormatError
from loramux.adapters.lora import LoraPair
from loramux.adapters.sparse.convert import convert
from loramux.adapters.sparse.model import ExpertMixture, Kind, RankMixture, SparseModel
from loramux.adapters.sparse.read import read_sparse
from loramux.adapters.sparse.write import write_loracoe, write_loramoe, write_mixlora
from tests.peft_kit import SEVEN, tensors
from tests.sparse_kit import (
    LAYOUT_1,
    TARGETS,
    assert_equal,
    base_shapes,
    in_old_layout,
    linear_tensors,
    loracoe_config,
    loracoe_tensors,
    mixlora_config,
    mixlora_tensors,
    original_loramoe_tensors,
    save,
    small_base,
    small_config,
)

MIXLORA_FIELDS: list[dict[str, Any]] = [
    {},
    {"top_k": 1, "act_fn": None},
    {"use_rslora": True, "lora_alpha": 7},
    {"lora_alpha": 2.5},
    {"routing_strategy": "mixlora-dynamic", "top_p": 0.6, "temperature": 0.5},
    {"routing_strategy": "mixlora-switch", "expert_capacity": 9},
    {"expert_lora": {"r": 5, "lora_alpha": 3, "use_rslora": True}},
]


@pytest.mark.parametrize("fields", MIXLORA_FIELDS, ids=str)
def test_mixlora_comes_back_as_it_went(base: BaseShapes, tmp_path: Path, fields: dict[str, Any]) -> None:
    rank = fields.get("expert_lora", {}).get("r")
    before = mixlora_tensors(base, expert_rank=rank)
    save(tmp_path / "in", before, mixlora_config(**fields))
    model = read_sparse(tmp_path / "in", id="x", base=base)
    write_mixlora(model, tmp_path / "out", base_id="tiny")
    after = tensors(tmp_path / "out")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert_equal(read_sparse(tmp_path / "out", id="y", base=base), model)


@pytest.mark.parametrize("architecture", ["phi", "phi3"])
def test_mixlora_of_other_feed_forward_blocks_comes_back(architecture: str, tmp_path: Path) -> None:
    base = base_shapes(small_config(architecture))
    targets = TARGETS[architecture]
    save(tmp_path / "in", mixlora_tensors(base, targets), mixlora_config(target_modules=list(targets)))
    model = read_sparse(tmp_path / "in", id="x", base=base)
    write_mixlora(model, tmp_path / "out", base_id="tiny")
    assert_equal(read_sparse(tmp_path / "out", id="y", base=base), model)


def loracoe_model(base: BaseShapes, folder: Path, *, routers: bool = True, **fields: Any) -> SparseModel:
    values = loracoe_tensors(base, ("q_proj", "up_proj"), routers=routers)
    return read_sparse(save(folder, values, loracoe_config(**fields)), id="x", base=base)


@pytest.mark.parametrize(
    ("routers", "fields"),
    [
        (True, {}),
        (True, {"gate_gain": "rank", "router_temperature": 0.7, "router_bypass": "ones"}),
        (True, {"gate_gain": 1.25, "lora_alpha": 3.5, "use_rslora": True}),
        (False, {"router_bypass": "ones", "phase": "warmup"}),
        (False, {"router_bypass": "uniform", "gate_gain": "rank"}),
    ],
)
def test_loracoe_comes_back_as_it_went(
    base: BaseShapes, tmp_path: Path, routers: bool, fields: dict[str, Any]
) -> None:
    model = loracoe_model(base, tmp_path / "in", routers=routers, **fields)
    write_loracoe(model, tmp_path / "out", base_id="tiny")
    assert_equal(read_sparse(tmp_path / "out", id="y", base=base), model)


def test_loramoe_comes_back_as_it_went(base: BaseShapes, tmp_path: Path) -> None:
    config = {
        "r": 2,
        "lora_alpha": 4,
        "num_experts": 3,
        "target_modules": list(SEVEN),
        "peft_type": "LORAMOE",
    }
    save(tmp_path / "in", linear_tensors("loramoe", base, SEVEN, attention=False), config)
    model = read_sparse(tmp_path / "in", id="x", base=base)
    write_loramoe(model, tmp_path / "out", base_id="tiny")
    assert_equal(read_sparse(tmp_path / "out", id="y", base=base), model)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 4


def test_the_loramoe_of_its_authors_moves_into_the_container_of_moe_peft(
    base: BaseShapes, tmp_path: Path
) -> None:
    targets = ("gate_proj", "down_proj")
    config = {"r": 2, "lora_alpha": 4, "lora_nums": 3, "target_modules": list(targets), "peft_type": "LORA"}
    save(tmp_path / "in", original_loramoe_tensors(base, targets), config)
    model = read_sparse(tmp_path / "in", id="x", base=base)
    write_loramoe(model, tmp_path / "out", base_id="tiny")
    moved = read_sparse(tmp_path / "out", id="y", base=base)
    for path, mixture in model.linear.items():
        other = moved.linear[path]
        assert isinstance(mixture, ExpertMixture)
        assert isinstance(other, ExpertMixture)
        assert torch.equal(mixture.router, other.router)
        assert torch.equal(mixture.factors.a, other.factors.a)
        assert torch.equal(mixture.factors.b, other.factors.b)


def test_what_a_format_cannot_hold_is_not_written(base: BaseShapes, tmp_path: Path) -> None:
    model = loracoe_model(base, tmp_path / "in")
    q0 = "model.layers.0.self_attn.q_proj"
    mixture = model.linear[q0]
    assert isinstance(mixture, RankMixture)

    def with_q0(changed: RankMixture) -> SparseModel:
        return replace(model, linear=MappingProxyType({**model.linear, q0: changed}))

    wrong = [
        (replace(model, kind=Kind.MOLA), "is mola; loracoe and nothing else"),
        (replace(model, plain={q0: LoraPair(torch.ones(1, 1), torch.ones(1, 1), 1.0)}), "and nothing else"),
        (with_q0(replace(mixture, gain=3.0)), "gain.* must be the same"),
        (with_q0(replace(mixture, router=None)), "having a router must be the same"),
        (with_q0(replace(mixture, scale=9.0)), "rank and scale"),
        (replace(model, linear={q0: replace(mixture, bypass=0.3)}), "bypass is 0.3"),
    ]
    for broken, message in wrong:
        with pytest.raises(AdapterFormatError, match=message):
            write_loracoe(broken, tmp_path / "out", base_id="tiny")
    with pytest.raises(AdapterFormatError, match="is loracoe; mixlora and nothing else"):
        write_mixlora(model, tmp_path / "out", base_id="tiny")
    assert not (tmp_path / "out").exists()


def test_loramoe_outside_the_feed_forward_block_has_no_place_in_the_container(
    base: BaseShapes, tmp_path: Path
) -> None:
    config = {"r": 2, "lora_alpha": 4, "lora_nums": 3, "target_modules": ["q_proj"], "peft_type": "LORA"}
    save(tmp_path / "in", original_loramoe_tensors(base, ["q_proj"]), config)
    model = read_sparse(tmp_path / "in", id="x", base=base)
    with pytest.raises(
        AdapterFormatError, match=r"q_proj: this container holds mixtures of all experts only"
    ):
        write_loramoe(model, tmp_path / "out", base_id="tiny")


@pytest.mark.skipif(importlib.util.find_spec("mixlora") is None, reason="pip mixlora is not installed")
@pytest.mark.parametrize("layout", [1, 3])
def test_pip_mixlora_loads_what_is_written(tmp_path: Path, layout: int) -> None:
    """Its own loader and its own injection, on the tensors that were written."""
    from mixlora.model import inject_adapter_in_model, load_adapter_weights

    base = base_shapes(small_config())
    values = mixlora_tensors(base)
    folder = tmp_path / "in"
    if layout == 3:
        save(tmp_path / "first", values, mixlora_config())
        write_mixlora(read_sparse(tmp_path / "first", id="x", base=base), folder, base_id="tiny")
    else:
        names = [LAYOUT_1.get(name, name) for name in SEVEN]
        save(
            folder, in_old_layout(values, 1), mixlora_config(target_modules=names, routing_strategy="mixtral")
        )
    convert(folder, tmp_path / "out", layout=3, to_bin=True)
    config, weights = load_adapter_weights(str(tmp_path / "out"), device="cpu")
    assert weights.keys() == values.keys()
    assert all(torch.equal(weights[key], values[key]) for key in values)
    model = small_base()
    inject_adapter_in_model(model, config, weights)
    for block in model.model.layers:
        for moe in block.mlp.mixlora_moes.values():
            for expert in moe.experts_.values():
                expert.eval()
    tokens = torch.randint(0, 37, (2, 7))
    logits: Tensor = model(tokens).logits
    assert torch.isfinite(logits).all()
    assert (config.top_k_, config.lora_r_, config.lora_alpha_) == (2, 3, 6)
