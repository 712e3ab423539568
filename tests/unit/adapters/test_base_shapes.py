"""The shapes of a base: the same from a model, from a packed model and from its config alone."""

from pathlib import Path

import bitsandbytes as bnb
import pytest
from torch import nn

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import BaseMismatchError
from tests.peft_kit import small_llama


def test_a_config_directory_gives_the_shapes_of_its_model(tmp_path: Path) -> None:
    model = small_llama()
    model.config.save_pretrained(tmp_path)
    shapes = BaseShapes.from_model(model, "tiny")
    assert BaseShapes.from_config_dir(tmp_path, "tiny") == shapes
    assert len(shapes.modules) == 14
    assert shapes.modules["model.layers.1.mlp.down_proj"] == (24, 40)
    assert shapes.modules["model.layers.0.self_attn.k_proj"] == (16, 24)


def test_the_head_is_listed_only_on_request() -> None:
    model = small_llama()
    assert "lm_head" not in BaseShapes.from_model(model, "tiny").modules
    assert BaseShapes.from_model(model, "tiny", include_head=True).modules["lm_head"] == (37, 24)


def test_packed_layers_keep_their_logical_shape() -> None:
    packed = bnb.nn.Linear4bit(64, 32, quant_type="nf4")
    packed.load_state_dict(nn.Linear(64, 32).state_dict())
    packed = packed.to("cpu")
    assert packed.weight.shape != (32, 64)
    assert BaseShapes.from_model(nn.ModuleDict({"up": packed}), "x").modules == {"up": (32, 64)}


def test_shapes_cannot_be_changed() -> None:
    given = {"up": (2, 3)}
    shapes = BaseShapes("x", given)
    given["down"] = (3, 2)
    assert dict(shapes.modules) == {"up": (2, 3)}
    with pytest.raises(TypeError):
        shapes.modules["up"] = (1, 1)  # type: ignore[index]


def test_places_without_a_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(BaseMismatchError, match=r"holds no config\.json"):
        BaseShapes.from_config_dir(tmp_path, "x")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BaseMismatchError, match=r"config\.json"):
        BaseShapes.from_config_dir(tmp_path, "x")
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    with pytest.raises(BaseMismatchError, match="no such model"):
        BaseShapes.from_config_dir(tmp_path, "x")
    with pytest.raises(BaseMismatchError, match="no linear module"):
        BaseShapes.from_model(nn.ReLU(), "x")
