"""PEFT directories: everything PEFT writes as a plain LoRA is read right, everything else is refused."""

import json
import struct
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
from loramux.adapters.lora import LoraAdapter, LoraPair
from loramux.adapters.merge import merge
from loramux.adapters.peft_format import read_lora, write_lora
from tests.peft_kit import (
    change_config,
    distance,
    peft_logits,
    save_peft,
    small_llama,
    tensors,
    weighted_sum,
    write_tensors,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

BASE = BaseShapes.from_model(small_llama(), "tiny")
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank 1": {"r": 1, "lora_alpha": 1},
    "rslora": {"use_rslora": True, "r": 9, "lora_alpha": 5},
    "rank pattern": {"rank_pattern": {"q_proj": 7, "down_proj": 2}},
    "alpha pattern": {"alpha_pattern": {r"layers\.1\..*_proj": 11, "up_proj": 3}},
    "first pattern wins": {"rank_pattern": {r".*\.0\.mlp\.gate_proj": 3, "gate_proj": 5}},
    "all patterns, rslora": {
        "rank_pattern": {"model.layers.1.self_attn.v_proj": 6, "(q|k)_proj": 3},
        "alpha_pattern": {"(up|gate)_proj": 1, "v_proj": 40},
        "use_rslora": True,
    },
    "pattern needs a dot before it": {"rank_pattern": {"proj": 9, "roj": 8}},
    "two targets": {"target_modules": ["q_proj", "down_proj"]},
    "regular expression": {"target_modules": r".*\.1\..*(v_proj|up_proj)"},
    "all linear": {"target_modules": "all-linear"},
    "excluded": {"exclude_modules": ["o_proj", "model.layers.0.mlp.up_proj"]},
    "one layer": {"layers_to_transform": [1]},
    "dropout": {"lora_dropout": 0.3},
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_peft(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning")
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_plain_lora_means_what_it_means_to_peft(tmp_path: Path, fields: dict[str, Any]) -> None:
    deltas = save_peft(tmp_path, **fields)
    adapter = read_lora(tmp_path, id="x", base=BASE)
    assert set(adapter.pairs) == set(deltas)
    for module, delta in deltas.items():
        assert torch.allclose(adapter.delta(module), delta, rtol=1e-12, atol=0), module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_keep_their_bits(saved: Path, dtype: torch.dtype) -> None:
    written = {key: value.to(dtype) for key, value in tensors(saved).items()}
    write_tensors(saved, written)
    adapter = read_lora(saved, id="x", base=BASE)
    assert adapter.dtype == dtype
    for module, pair in adapter.pairs.items():
        assert torch.equal(pair.a, written[f"base_model.model.{module}.lora_A.weight"])
        assert torch.equal(pair.b, written[f"base_model.model.{module}.lora_B.weight"])


def test_asked_for_dtype_and_mixed_files(saved: Path) -> None:
    assert read_lora(saved, id="x", base=BASE, dtype=torch.bfloat16).dtype == torch.bfloat16
    mixed = tensors(saved)
    mixed[f"{Q0}.lora_A.weight"] = mixed[f"{Q0}.lora_A.weight"].bfloat16()
    write_tensors(saved, mixed)
    assert read_lora(saved, id="x", base=BASE).dtype == torch.float32


def test_keys_may_carry_the_adapter_name(saved: Path) -> None:
    plain = read_lora(saved, id="x", base=BASE)
    write_tensors(saved, {key.replace(".weight", ".default.weight"): v for key, v in tensors(saved).items()})
    named = read_lora(saved, id="x", base=BASE)
    assert all(torch.equal(plain.delta(module), named.delta(module)) for module in plain.pairs)


def test_the_content_hash_covers_what_is_computed_and_nothing_else(saved: Path) -> None:
    first = read_lora(saved, id="x", base=BASE).content_hash
    change_config(saved, task_type="SEQ_CLS", lora_dropout=0.5, base_model_name_or_path="other")
    assert read_lora(saved, id="y", base=BASE, any_base=True, dtype=torch.bfloat16).content_hash == first
    change_config(saved, lora_alpha=7)
    louder = read_lora(saved, id="x", base=BASE, any_base=True).content_hash
    change_config(saved, lora_alpha=6)
    values = tensors(saved)
    values[f"{Q0}.lora_A.weight"][0, 0] += 1
    write_tensors(saved, values)
    edited = read_lora(saved, id="x", base=BASE, any_base=True).content_hash
    assert len({first, louder, edited}) == 3


def test_sizes_and_ranks(tmp_path: Path) -> None:
    save_peft(tmp_path, rank_pattern={"q_proj": 7})
    adapter = read_lora(tmp_path, id="x", base=BASE)
    assert adapter.max_rank == 7
    assert {rank for module, rank in adapter.ranks.items() if "q_proj" in module} == {7}
    assert adapter.nbytes == sum(value.nbytes for value in tensors(tmp_path).values())


def test_an_ordinary_adapter_survives_writing_bit_for_bit(saved: Path, tmp_path: Path) -> None:
    adapter = read_lora(saved, id="x", base=BASE)
    copy = tmp_path / "copy"
    write_lora(adapter, copy, "tiny")
    assert json.loads((copy / "adapter_config.json").read_text())["lora_alpha"] == 6
    before, after = tensors(saved), tensors(copy)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = read_lora(copy, id="x", base=BASE)
    assert all(torch.equal(adapter.delta(module), again.delta(module)) for module in adapter.pairs)


def test_a_written_blend_gives_real_peft_the_same_logits(tmp_path: Path) -> None:
    fields = [CONFIGS["all patterns, rslora"], CONFIGS["two targets"], CONFIGS["one layer"]]
    weights = [0.8, -0.5, 1.3]
    parts, deltas = [], []
    for i, chosen in enumerate(fields):
        deltas.append(save_peft(tmp_path / str(i), **chosen))
        parts.append(read_lora(tmp_path / str(i), id=str(i), base=BASE))
    merged = merge(list(zip(parts, weights, strict=True)), "exact").adapter
    write_lora(merged, tmp_path / "blend", "tiny")
    model = small_llama()
    tokens = torch.randint(0, 37, (2, 11))
    reference = small_llama()
    reference.load_state_dict(model.state_dict())
    for module, delta in weighted_sum(list(zip(deltas, weights, strict=True))).items():
        layer = reference.get_submodule(module)
        layer.weight.data = (layer.weight.double() + delta).float()
    wanted = reference(tokens).logits
    assert not torch.allclose(model(tokens).logits, wanted, atol=1e-2)
    assert torch.allclose(peft_logits(model, tmp_path / "blend", tokens), wanted, atol=2e-5, rtol=1e-4)
    assert (
        distance(read_lora(tmp_path / "blend", id="b", base=BASE), {m: merged.delta(m) for m in merged.pairs})
        < 1e-6
    )


def test_what_cannot_be_written_is_refused_before_a_file_exists(tmp_path: Path) -> None:
    loud = LoraPair(torch.ones(2, 24).half(), torch.full((24, 2), 6e4).half(), 2.0)
    quiet = LoraPair(torch.ones(2, 24).half(), torch.ones(24, 2).half(), 1.0)
    adapter = LoraAdapter("x", "h", {"up": loud, "down": quiet})
    with pytest.raises(AdapterFormatError, match=r"up: scale 2 times B leaves the range of torch\.float16"):
        write_lora(adapter, tmp_path / "out", "tiny")
    with pytest.raises(AdapterFormatError, match="no modules"):
        write_lora(LoraAdapter("x", "h", {}), tmp_path / "out", "tiny")
    assert not (tmp_path / "out").exists()


REFUSED_CONFIGS: list[tuple[dict[str, Any], type[AdapterError], str]] = [
    ({"peft_type": "LOHA"}, UnsupportedAdapterError, "peft_type is 'LOHA'"),
    ({"peft_type": None}, UnsupportedAdapterError, "peft_type is None"),
    ({"peft_type": "MIXLORA", "routing_strategy": "mixlora"}, UnsupportedAdapterError, "MixLoRA"),
    ({"use_dora": True}, UnsupportedAdapterError, "use_dora.*magnitude"),
    ({"bias": "all"}, UnsupportedAdapterError, "bias is 'all'"),
    ({"bias": "lora_only"}, UnsupportedAdapterError, "bias is 'lora_only'"),
    ({"lora_bias": True}, UnsupportedAdapterError, "lora_bias"),
    ({"modules_to_save": ["lm_head"]}, UnsupportedAdapterError, "modules_to_save"),
    ({"trainable_token_indices": [1, 2]}, UnsupportedAdapterError, "trainable_token_indices"),
    ({"fan_in_fan_out": True}, UnsupportedAdapterError, "fan_in_fan_out"),
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


def test_unknown_fields_that_are_off_do_no_harm(saved: Path) -> None:
    change_config(saved, new_flag=False, new_dict={}, new_list=[], new_none=None, new_text="")
    read_lora(saved, id="x", base=BASE)


def test_another_base_can_be_allowed(saved: Path) -> None:
    change_config(saved, base_model_name_or_path="/home/someone/llama")
    read_lora(saved, id="x", base=BASE, any_base=True)


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
A0 = f"{Q0}.lora_A.weight"
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


def _header(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut in the data": lambda data: data[:-7],
    "cut in the header": lambda data: data[:60],
    "longer than it says": lambda data: data + b"\0" * 16,
    "huge header": lambda data: struct.pack("<Q", 2**60) + data[8:],
    "no json": lambda data: data[:8] + b"#" * (len(data) - 8),
    "shape lies": lambda data: _header(data, lambda header: header[A0].update(shape=[400, 24])),
    "offset lies": lambda data: _header(data, lambda header: header[A0].update(data_offsets=[0, 2**40])),
    "offsets overlap": lambda data: _header(
        data, lambda header: header[A0].update(data_offsets=header[A0.replace("_A", "_B")]["data_offsets"])
    ),
    "a pickle": lambda data: b"\x80\x04cos\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_files_are_refused(saved: Path, damage: Callable[[bytes], bytes]) -> None:
    path = saved / "adapter_model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(AdapterFormatError, match="not a readable safetensors file"):
        read_lora(saved, id="x", base=BASE)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_damaged_configs_are_refused(saved: Path, text: bytes) -> None:
    (saved / "adapter_config.json").write_bytes(text)
    with pytest.raises(AdapterFormatError, match=r"adapter_config\.json"):
        read_lora(saved, id="x", base=BASE)


def test_missing_files_and_pickles_are_named(saved: Path) -> None:
    with pytest.raises(AdapterFormatError, match="no such directory"):
        read_lora(saved / "nowhere", id="x", base=BASE)
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterFormatError, match=r"adapter_model\.safetensors is missing"):
        read_lora(saved, id="x", base=BASE)
    (saved / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsupportedAdapterError, match="pickle"):
        read_lora(saved, id="x", base=BASE)
    (saved / "adapter_config.json").unlink()
    with pytest.raises(AdapterFormatError, match=r"adapter_config\.json is missing"):
        read_lora(saved, id="x", base=BASE)


def test_links_may_not_lead_outside(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    file = saved / "adapter_model.safetensors"
    file.rename(outside / file.name)
    file.symlink_to(outside / file.name)
    with pytest.raises(AdapterPathError, match="outside the allowed directory"):
        read_lora(saved, id="x", base=BASE)
    assert read_lora(saved, id="x", base=BASE, root=saved.parent.parent).pairs
    file.unlink()
    (outside / file.name).rename(saved / "blob")
    file.symlink_to("blob")
    assert read_lora(saved, id="x", base=BASE).pairs
