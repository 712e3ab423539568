"""LoRAMoE, MoLA and LoRACoE: read tensor by tensor."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import AdapterFormatError, BaseMismatchError, UnsupportedAdapterError
from loramux.adapters.sparse.model import ExpertMixture, Kind, RankMixture
from loramux.adapters.sparse.options import ReadOptions
from loramux.adapters.sparse.read import read_sparse
from tests.peft_kit import SEVEN
from tests.sparse_kit import (
    assert_equal,
    linear_tensors,
    loracoe_config,
    loracoe_tensors,
    original_loramoe_tensors,
    save,
    targeted,
)

FFN = ("gate_proj", "up_proj", "down_proj")
Q0 = "model.layers.0.self_attn.q_proj"


def container_config(kind: str, targets: tuple[str, ...], **fields: Any) -> dict[str, Any]:
    return {
        "bias": "none",
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": 2,
        "lora_alpha": 5,
        "lora_dropout": 0.05,
        "target_modules": list(targets),
        "routing_strategy": kind.lower(),
        "num_experts": 3,
        **fields,
    }


def test_loramoe_in_the_container_of_moe_peft_has_a_gate_per_projection(
    base: BaseShapes, tmp_path: Path
) -> None:
    tensors = linear_tensors("loramoe", base, SEVEN, attention=False)
    save(tmp_path, tensors, container_config("LORAMOE", SEVEN))
    model = read_sparse(tmp_path, id="x", base=base)
    assert model.kind is Kind.LORAMOE
    assert set(model.linear) == set(targeted(base, FFN))
    # What its authors' program does with attention targets: ordinary LoRA.
    assert set(model.plain) == set(base.modules) - set(model.linear)
    for path, mixture in model.linear.items():
        assert isinstance(mixture, ExpertMixture)
        key = path.replace("model.", "loramoe.", 1)
        assert mixture.top_k is None
        assert torch.equal(mixture.router, tensors[f"{key}.moe_gate.weight"])
        assert mixture.factors.scale == 5 / 2
        assert torch.equal(mixture.factors.a[2], tensors[f"{key}.experts.2.lora_A.weight"])
        assert torch.equal(mixture.factors.b[0], tensors[f"{key}.experts.0.lora_B.weight"])


@pytest.mark.parametrize(("fields", "top_k"), [({}, 2), ({"top_k": 1}, 1)])
def test_mola_routes_attention_too(
    base: BaseShapes, tmp_path: Path, fields: dict[str, Any], top_k: int
) -> None:
    targets = ("q_proj", "down_proj")
    tensors = linear_tensors("mola", base, targets, attention=True)
    save(tmp_path, tensors, container_config("MOLA", targets, **fields))
    model = read_sparse(tmp_path, id="x", base=base)
    assert (model.kind, dict(model.plain), model.summary["top_k"]) == (Kind.MOLA, {}, top_k)
    assert set(model.linear) == set(targeted(base, targets))
    mixture = model.linear[Q0]
    assert isinstance(mixture, ExpertMixture)
    assert mixture.top_k == top_k
    assert torch.equal(mixture.router, tensors["mola.layers.0.self_attn.q_proj.moe_gate.weight"])


def original_config(**fields: Any) -> dict[str, Any]:
    """As the authors' fork of PEFT saves a config, fields of that old PEFT included."""
    return {
        "base_model_name_or_path": "tiny",
        "bias": "none",
        "blc_alpha": 0.1,
        "blc_weight": 0.1,
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "lora_nums": 3,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 2,
        "target_modules": list(FFN),
        "task_type": "CAUSAL_LM",
        **fields,
    }


def test_loramoe_of_its_authors(base: BaseShapes, tmp_path: Path) -> None:
    tensors = original_loramoe_tensors(base, FFN)
    save(tmp_path, tensors, original_config())
    model = read_sparse(tmp_path, id="x", base=base)
    assert (model.kind, set(model.linear)) == (Kind.LORAMOE, set(targeted(base, FFN)))
    for path, mixture in model.linear.items():
        assert isinstance(mixture, ExpertMixture)
        assert (mixture.top_k, mixture.factors.scale) == (None, 32 / 2)
        assert torch.equal(mixture.router, tensors[f"base_model.model.{path}.lora_route.weight"])
        for expert in range(3):
            assert torch.equal(
                mixture.factors.a[expert], tensors[f"base_model.model.{path}.lora_A{expert}.weight"]
            )
            assert torch.equal(
                mixture.factors.b[expert], tensors[f"base_model.model.{path}.lora_B{expert}.weight"]
            )


def test_both_spellings_of_loramoe_with_paths_are_one_model(base: BaseShapes, tmp_path: Path) -> None:
    tensors = original_loramoe_tensors(base, ("q_proj", "up_proj"))
    ours = {
        key.replace("lora_route", "lora_router")
        .replace("lora_A", "lora_A.")
        .replace("lora_B", "lora_B."): tensor
        for key, tensor in tensors.items()
    }
    save(tmp_path / "authors", tensors, original_config(target_modules=r".*\.(q_proj|up_proj)"))
    config = {"peft_type": "LORAMOE", "r": 2, "lora_alpha": 32, "num_experts": 3}
    save(tmp_path / "ours", ours, {**config, "target_modules": ["q_proj", "up_proj"]})
    assert_equal(
        read_sparse(tmp_path / "authors", id="x", base=base),
        read_sparse(tmp_path / "ours", id="y", base=base),
    )
    save(tmp_path / "mixed", {**tensors, **ours}, original_config())
    with pytest.raises(AdapterFormatError, match="two spellings"):
        read_sparse(tmp_path / "mixed", id="x", base=base)


def test_loracoe_keeps_factors_and_router_apart(base: BaseShapes, tmp_path: Path) -> None:
    tensors = loracoe_tensors(base, ("q_proj", "up_proj"))
    save(tmp_path, tensors, loracoe_config(router_temperature=0.5), {"format": "loracoe", "version": "1"})
    model = read_sparse(tmp_path, id="x", base=base)
    assert (model.kind, set(model.linear)) == (Kind.LORACOE, set(targeted(base, ("q_proj", "up_proj"))))
    mixture = model.linear[Q0]
    assert isinstance(mixture, RankMixture)
    assert (mixture.scale, mixture.experts, mixture.temperature, mixture.gain) == (2.0, 2, 0.5, 1.0)
    key = f"base_model.model.{Q0}"
    assert torch.equal(mixture.a, tensors[f"{key}.lora_A.weight"])
    assert torch.equal(mixture.b, tensors[f"{key}.lora_B.weight"])
    assert mixture.router is not None
    assert torch.equal(mixture.router, tensors[f"{key}.lora_router.weight"])


@pytest.mark.parametrize(
    ("fields", "gain"),
    [({}, 1.0), ({"gate_gain": "none"}, 1.0), ({"gate_gain": "rank"}, 4.0), ({"gate_gain": 2.5}, 2.5)],
)
def test_the_gain_of_loracoe_becomes_a_number(
    base: BaseShapes, tmp_path: Path, fields: dict[str, Any], gain: float
) -> None:
    save(tmp_path, loracoe_tensors(base, ("q_proj", "up_proj")), loracoe_config(**fields, use_rslora=True))
    mixture = read_sparse(tmp_path, id="x", base=base).linear[Q0]
    assert isinstance(mixture, RankMixture)
    assert (mixture.gain, mixture.scale) == (gain, 8 / math.sqrt(4))


@pytest.mark.parametrize(("named", "bypass"), [("uniform", 0.25), ("ones", 1.0)])
def test_loracoe_without_its_router_has_the_gate_its_config_names(
    base: BaseShapes, tmp_path: Path, named: str, bypass: float
) -> None:
    """Both ways of having no router: a checkpoint of the warm-up, and a router that the operator bypasses."""
    tensors = loracoe_tensors(base, ("q_proj", "up_proj"))
    factors = {key: tensor for key, tensor in tensors.items() if "router" not in key}
    save(tmp_path / "joint", tensors, loracoe_config(router_bypass=named, phase="joint"))
    save(tmp_path / "warmup", factors, loracoe_config(router_bypass=named, phase="warmup"))
    joint = read_sparse(tmp_path / "joint", id="x", base=base)
    without = read_sparse(tmp_path / "joint", id="x", base=base, options=ReadOptions(bypass_router=True))
    warmup = read_sparse(tmp_path / "warmup", id="x", base=base)
    for model in (without, warmup):
        mixture = model.linear[Q0]
        assert isinstance(mixture, RankMixture)
        assert (mixture.router, mixture.bypass, model.summary["router_bypass"]) == (None, bypass, named)
    assert joint.content_hash != without.content_hash


def test_the_warm_up_of_loracoe_must_say_what_its_gate_is(base: BaseShapes, tmp_path: Path) -> None:
    """Between the whole delta and one rank-th of it nothing can be guessed."""
    factors = loracoe_tensors(base, ("q_proj", "up_proj"), routers=False)
    save(tmp_path, factors, loracoe_config())
    with pytest.raises(UnsupportedAdapterError, match=r"router_bypass is None; served are uniform, ones"):
        read_sparse(tmp_path, id="x", base=base)


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_experts": 3}, AdapterFormatError, r"lora_router.weight has 8 .* experts × rank.* says 12"),
    ({"num_experts": None}, AdapterFormatError, "num_experts must be .*missing"),
    ({"router_softmax_dim": "expert"}, UnsupportedAdapterError, "router_softmax_dim is 'expert'"),
    ({"router_reduction": "sum"}, UnsupportedAdapterError, "router_reduction is 'sum'"),
    ({"router_temperature": 0}, AdapterFormatError, "router_temperature"),
    ({"gate_gain": "sqrt"}, UnsupportedAdapterError, "gate_gain is 'sqrt'; served are none, rank"),
    ({"gate_gain": -1}, AdapterFormatError, "gate_gain"),
    ({"gate_gain": True}, AdapterFormatError, "gate_gain"),
    ({"router_bypass": "zero"}, UnsupportedAdapterError, "router_bypass is 'zero'"),
    ({"phase": "warmup"}, AdapterFormatError, "phase is 'warmup', but the file has routers"),
    ({"phase": "later"}, UnsupportedAdapterError, "phase is 'later'"),
    ({"target_modules": ["q_proj"]}, AdapterFormatError, "up_proj.*does not target"),
    ({"target_modules": ["query"]}, BaseMismatchError, "name no linear module"),
    ({"target_modules": "(a+)+"}, AdapterFormatError, "repeats a group"),
    ({"use_dora": True}, UnsupportedAdapterError, "use_dora"),
]


@pytest.mark.parametrize(("fields", "error", "message"), REFUSED, ids=[str(case[0]) for case in REFUSED])
def test_a_loracoe_config_that_cannot_be_served_is_refused_by_field(
    base: BaseShapes, tmp_path: Path, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    save(tmp_path, loracoe_tensors(base, ("q_proj", "up_proj")), loracoe_config(**fields))
    with pytest.raises(error, match=message):
        read_sparse(tmp_path, id="x", base=base)


def test_another_version_of_the_loracoe_format_is_refused(base: BaseShapes, tmp_path: Path) -> None:
    tensors = loracoe_tensors(base, ("q_proj", "up_proj"))
    save(tmp_path, tensors, loracoe_config(), {"format": "loracoe", "version": "2"})
    with pytest.raises(UnsupportedAdapterError, match="version '2'"):
        read_sparse(tmp_path, id="x", base=base)
