"""MixLoRA checkpoints: every key layout, strategy and architecture, tensor by tensor."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.activations import ACT2FN

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import AdapterFormatError, BaseMismatchError, UnsupportedAdapterError
from loramux.adapters.sparse.fields import Fields
from loramux.adapters.sparse.mixlora import mixlora
from loramux.adapters.sparse.model import FfnRouting, FfnStrategy, Kind
from loramux.adapters.sparse.options import ReadOptions
from loramux.adapters.sparse.read import measure_sparse, read_sparse
from tests.sparse_kit import (
    ARCHITECTURES,
    LAYOUT_1,
    SEVEN,
    TARGETS,
    assert_equal,
    base_shapes,
    in_old_layout,
    llama_2_7b,
    mixlora_config,
    mixlora_tensors,
    save,
    small_config,
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_layouts_read_to_the_same_model(architecture: str, tmp_path: Path) -> None:
    base = base_shapes(small_config(architecture))
    targets = list(TARGETS[architecture])
    tensors = mixlora_tensors(base, targets)
    save(tmp_path / "3", tensors, mixlora_config(target_modules=targets))
    model = read_sparse(tmp_path / "3", id="x", base=base)
    for layout in (1, 2):
        names = [LAYOUT_1.get(name, name) for name in targets] if layout == 1 else targets
        config = mixlora_config(target_modules=names, routing_strategy="mixtral")
        folder = save(tmp_path / str(layout), in_old_layout(tensors, layout), config)
        assert_equal(read_sparse(folder, id=str(layout), base=base), model)
    ffn = [name for name in targets if f"model.layers.0.mlp.{name}" in base.modules]
    assert model.kind is Kind.MIXLORA
    assert sorted(model.ffn) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert len(model.plain) == 2 * (len(targets) - len(ffn))
    for path, block in model.ffn.items():
        key = path.replace("model.", "mixlora.", 1)
        assert torch.equal(block.router, tensors[f"{key}.moe_gate.weight"])
        assert sorted(block.projections) == sorted(ffn)
        for name, factors in block.projections.items():
            assert factors.scale == 6 / 3
            for expert in range(4):
                assert torch.equal(factors.a[expert], tensors[f"{key}.{name}.experts.{expert}.lora_A.weight"])
                assert torch.equal(factors.b[expert], tensors[f"{key}.{name}.experts.{expert}.lora_B.weight"])
    for path, pair in model.plain.items():
        key = path.replace("model.", "mixlora.", 1)
        assert pair.scale == 6 / 3
        assert torch.equal(pair.a, tensors[f"{key}.lora_A.weight"])
        assert torch.equal(pair.b, tensors[f"{key}.lora_B.weight"])


TOP_K, TOP_P, SWITCH = FfnStrategy.TOP_K, FfnStrategy.TOP_P, FfnStrategy.SWITCH
ROUTINGS: list[tuple[dict[str, Any], FfnRouting]] = [
    ({"routing_strategy": "mixlora", "top_k": 3}, FfnRouting(TOP_K, top_k=3)),
    ({"routing_strategy": "mixlora", "top_k": None}, FfnRouting(TOP_K, top_k=2)),
    ({"routing_strategy": "mixtral"}, FfnRouting(TOP_K, top_k=2)),
    ({"routing_strategy": "mixlora-dynamic"}, FfnRouting(TOP_P, top_p=0.8, temperature=0.0)),
    (
        {"routing_strategy": "mixlora-dynamic", "top_p": 0.5, "temperature": 0.7},
        FfnRouting(TOP_P, top_p=0.5, temperature=0.7),
    ),
    ({"routing_strategy": "mixlora-switch", "expert_capacity": 7, "sparse_step": None}, FfnRouting(SWITCH)),
    ({"routing_strategy": "switch"}, FfnRouting(SWITCH)),
]


@pytest.mark.parametrize(("fields", "routing"), ROUTINGS, ids=[str(fields) for fields, _ in ROUTINGS])
def test_strategies_and_the_defaults_of_what_is_never_saved(
    base: BaseShapes, tmp_path: Path, fields: dict[str, Any], routing: FfnRouting
) -> None:
    save(tmp_path, mixlora_tensors(base), mixlora_config(**fields))
    model = read_sparse(tmp_path, id="x", base=base)
    assert {block.routing for block in model.ffn.values()} == {routing}
    assert model.summary["strategy"] == routing.strategy


@pytest.mark.parametrize(("saved", "capacity"), [({"expert_capacity": 7}, 7), ({}, 32)])
def test_switch_never_drops_a_token_unless_the_training_is_to_be_replayed(
    base: BaseShapes, tmp_path: Path, saved: dict[str, int], capacity: int
) -> None:
    save(tmp_path, mixlora_tensors(base), mixlora_config(routing_strategy="mixlora-switch", **saved))
    served = read_sparse(tmp_path, id="x", base=base)
    replayed = read_sparse(tmp_path, id="x", base=base, options=ReadOptions(replay_capacity=True))
    assert served.ffn["model.layers.1.mlp"].routing.capacity is None
    assert replayed.ffn["model.layers.1.mlp"].routing.capacity == capacity
    assert served.content_hash != replayed.content_hash


def test_experts_may_have_rank_and_alpha_of_their_own(base: BaseShapes, tmp_path: Path) -> None:
    tensors = mixlora_tensors(base, rank=3, expert_rank=5)
    # As its authors' program exports it; `bias` and the rest of a LoRA config come along.
    inner = {"bias": "none", "r": 5, "lora_alpha": 7, "lora_dropout": 0.1, "use_rslora": True}
    save(tmp_path, tensors, mixlora_config(expert_lora=inner))
    model = read_sparse(tmp_path, id="x", base=base)
    assert {pair.scale for pair in model.plain.values()} == {6 / 3}
    factors = model.ffn["model.layers.0.mlp"].projections["up_proj"]
    assert (factors.rank, factors.scale) == (5, 7 / math.sqrt(5))


def test_what_expert_lora_leaves_out_is_taken_from_the_rest(base: BaseShapes, tmp_path: Path) -> None:
    save(tmp_path, mixlora_tensors(base), mixlora_config(use_rslora=True, expert_lora={"lora_alpha": 9}))
    model = read_sparse(tmp_path, id="x", base=base)
    assert model.plain["model.layers.0.self_attn.q_proj"].scale == 6 / math.sqrt(3)
    assert model.ffn["model.layers.0.mlp"].projections["up_proj"].scale == 9 / math.sqrt(3)


def test_targets_may_be_an_object_and_fewer_than_seven(base: BaseShapes, tmp_path: Path) -> None:
    chosen = ("v_proj", "down_proj")
    save(
        tmp_path,
        mixlora_tensors(base, chosen),
        mixlora_config(target_modules={name: name in chosen for name in SEVEN}),
    )
    model = read_sparse(tmp_path, id="x", base=base)
    assert [list(block.projections) for block in model.ffn.values()] == [["down_proj"]] * 2
    assert {path.rpartition(".")[2] for path in model.plain} == {"v_proj"}


def test_the_activation_is_the_files_or_the_bases_own(base: BaseShapes, tmp_path: Path) -> None:
    tensors = mixlora_tensors(base)
    save(tmp_path / "named", tensors, mixlora_config(act_fn="gelu_new"))
    save(tmp_path / "left-out", tensors, mixlora_config(act_fn=None))
    save(tmp_path / "unknown", tensors, mixlora_config(act_fn="__class__"))
    named = read_sparse(tmp_path / "named", id="x", base=base).ffn["model.layers.0.mlp"]
    assert named.activation == "gelu_new"
    assert named.activation in ACT2FN
    assert read_sparse(tmp_path / "left-out", id="x", base=base).ffn["model.layers.0.mlp"].activation is None
    with pytest.raises(UnsupportedAdapterError, match="act_fn is '__class__'"):
        read_sparse(tmp_path / "unknown", id="x", base=base)


def test_dora_is_refused_because_its_magnitudes_were_never_saved(base: BaseShapes, tmp_path: Path) -> None:
    tensors = mixlora_tensors(base)
    save(tmp_path / "outer", tensors, mixlora_config(use_dora=True))
    save(tmp_path / "experts", tensors, mixlora_config(expert_lora={"use_dora": True}))
    save(tmp_path / "plain", tensors, mixlora_config())
    plain = read_sparse(tmp_path / "plain", id="x", base=base)
    for name in ("outer", "experts"):
        with pytest.raises(UnsupportedAdapterError, match=r"magnitudes were never saved.*allow-missing-dora"):
            read_sparse(tmp_path / name, id="x", base=base)
        model = read_sparse(tmp_path / name, id="x", base=base, options=ReadOptions(allow_missing_dora=True))
        assert model.content_hash == plain.content_hash
        assert "never saved" in str(model.summary["dora"])


def test_a_private_base_path_is_overridden_but_shapes_are_not(base: BaseShapes, tmp_path: Path) -> None:
    config = mixlora_config(base_model_name_or_path="/home/someone/models/Llama-2-7b-hf")
    save(tmp_path, mixlora_tensors(base), config)
    with pytest.raises(BaseMismatchError, match=r"/home/someone/models.*tiny.*override"):
        read_sparse(tmp_path, id="x", base=base)
    assert read_sparse(tmp_path, id="x", base=base, options=ReadOptions(any_base=True)).kind is Kind.MIXLORA
    with pytest.raises(BaseMismatchError, match="has shape"):
        read_sparse(tmp_path, id="x", base=llama_2_7b(), options=ReadOptions(any_base=True))
    with pytest.raises(BaseMismatchError, match=r"name no projection of base 'tiny'"):
        read_sparse(
            tmp_path, id="x", base=base_shapes(small_config("phi")), options=ReadOptions(any_base=True)
        )


def test_the_published_size_of_llama_2_7b(tmp_path: Path) -> None:
    """r = 16, 8 experts, seven modules: 813.7 MB in float32 (the file on the hub)."""
    config = mixlora_config(r=16, lora_alpha=32, num_experts=8, base_model_name_or_path="llama-2-7b")
    fields = Fields(tmp_path / "adapter_config.json", config)
    blueprint = mixlora(fields, tmp_path, [], llama_2_7b(), ReadOptions())
    assert blueprint.parameters == 203_423_744
    assert blueprint.router_parameters == 32 * 8 * 4096


def test_a_file_is_measured_from_its_header(base: BaseShapes, tmp_path: Path) -> None:
    tensors = mixlora_tensors(base)
    save(tmp_path, tensors, mixlora_config())
    size = measure_sparse(tmp_path, base=base)
    routers = sum(tensor.numel() for key, tensor in tensors.items() if "moe_gate" in key)
    assert size.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert size.nbytes(torch.bfloat16) == 2 * (size.parameters - routers) + 4 * routers


def test_factors_take_the_asked_type_and_routers_stay_in_float32(base: BaseShapes, tmp_path: Path) -> None:
    tensors = mixlora_tensors(base)
    save(tmp_path, tensors, mixlora_config())
    model = read_sparse(tmp_path, id="x", base=base, dtype=torch.bfloat16)
    block = model.ffn["model.layers.0.mlp"]
    assert block.router.dtype == torch.float32
    assert block.projections["up_proj"].a.dtype == torch.bfloat16
    assert model.plain["model.layers.0.self_attn.q_proj"].b.dtype == torch.bfloat16
    assert model.content_hash == read_sparse(tmp_path, id="y", base=base).content_hash


def test_a_file_in_bfloat16_stays_so_where_no_type_is_asked_for(base: BaseShapes, tmp_path: Path) -> None:
    tensors = {key: tensor.bfloat16() for key, tensor in mixlora_tensors(base).items()}
    save(tmp_path, tensors, mixlora_config())
    block = read_sparse(tmp_path, id="x", base=base).ffn["model.layers.0.mlp"]
    assert block.projections["up_proj"].a.dtype == torch.bfloat16
    assert torch.equal(block.router, tensors["mixlora.layers.0.mlp.moe_gate.weight"].float())


def test_the_hash_follows_what_the_model_says(base: BaseShapes, tmp_path: Path) -> None:
    tensors = mixlora_tensors(base)
    other = {**tensors, "mixlora.layers.0.mlp.moe_gate.weight": torch.randn(4, 24)}
    hashes = {
        read_sparse(save(tmp_path / str(i), tensors_, config), id="x", base=base).content_hash
        for i, (tensors_, config) in enumerate(
            [
                (tensors, mixlora_config()),
                (other, mixlora_config()),
                (tensors, mixlora_config(lora_alpha=7)),
                (tensors, mixlora_config(top_k=1)),
                (tensors, mixlora_config(act_fn="gelu")),
                (tensors, mixlora_config(routing_strategy="mixlora-switch")),
                # Not what it says: these two are the first one again.
                (dict(reversed(tensors.items())), mixlora_config(lora_dropout=0.2)),
                (tensors, mixlora_config(router_aux_loss_coef=0.01, jitter_noise=0.1)),
            ]
        )
    }
    assert len(hashes) == 6
    assert all(value.startswith("sha256:") for value in hashes)


def test_keys_of_two_layouts_in_one_file_are_refused(base: BaseShapes, tmp_path: Path) -> None:
    tensors = mixlora_tensors(base)
    moved = "mixlora.layers.1.mlp.up_proj.experts.0.lora_A.weight"
    old = in_old_layout({moved: tensors.pop(moved)}, 1)
    save(tmp_path, {**tensors, **old}, mixlora_config())
    with pytest.raises(AdapterFormatError, match=r"several MixLoRA layouts.*w3_proj.*layout 1"):
        read_sparse(tmp_path, id="x", base=base)
