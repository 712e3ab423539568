"""How weights are held: measured where nothing was asked for, and never at the price of another answer."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux.adapters.base_shapes import BaseShapes
from loramux.kernels.packed_linear import (
    Kind,
    StoredEmbedding,
    StoredLinear,
    Timing,
    library,
    store_weights,
    time_product,
    unpack,
)
from loramux.server.engine import weights
from loramux.server.engine.model import load_base
from loramux.server.engine.weights import HALVES, QUANTIZED, choose_weights
from tests.tiny import greedy, random_adapter, random_prompt, running, tiny_llama, with_delta


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Microseconds in float32 and as stored, which the measurement is made to find."""
    found = [10.0, 5.0]
    monkeypatch.setattr(weights, "time_product", lambda r, c, _: Timing(r, c, found[0] / 1e6, found[1] / 1e6))
    monkeypatch.setattr(weights, "library", object)
    return found


def test_halves_are_kept_where_that_is_faster(timing: list[float]) -> None:
    choice = choose_weights(torch.bfloat16, (64, 32))
    assert choice.kinds == HALVES[torch.bfloat16]
    assert choice.why.startswith("weights stay bfloat16, widened in registers")
    assert "64 x 32 takes 5 µs as stored, 10 in float32" in choice.why
    timing[1] = 15.0
    assert choose_weights(torch.bfloat16, (64, 32)).kinds is None
    assert choose_weights(torch.bfloat16, (64, 32), large=True).kinds == HALVES[torch.bfloat16]
    timing[1] = 25.0
    assert choose_weights(torch.bfloat16, (64, 32), large=True).kinds is None


def test_what_would_change_answers_is_not_chosen(timing: list[float]) -> None:
    assert choose_weights(torch.float32, (64, 32)).kinds is None
    assert choose_weights(None, (64, 32)).kinds is None
    for kinds in HALVES.values():
        assert {kinds.linear, kinds.embedding} <= {Kind.BF16, Kind.F16}


def test_without_the_library_weights_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "library", lambda: None)
    assert choose_weights(torch.bfloat16, (64, 32)).kinds is None


@pytest.mark.skipif(library() is None, reason="installed without a C++ compiler")
def test_the_measurement_measures() -> None:
    timing = time_product(100, 70, Kind.BF16)
    assert timing[:2] == (100, 70)
    assert 0 < timing.stored < 1
    assert 0 < timing.plain < 1


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4"])
def test_a_base_with_stored_weights_serves_mixtures(tmp_path: Path, form: str) -> None:
    """The oracle is a float32 model of the widened weights with the delta added in."""
    tiny_llama().bfloat16().save_pretrained(tmp_path)
    model = load_base(tmp_path, dtype="stored", device="cpu")
    plain: Any = tiny_llama()
    plain.load_state_dict(load_base(tmp_path, dtype="float32", device="cpu").state_dict())
    store_weights(model, QUANTIZED.get(form) or HALVES[torch.bfloat16])
    for path, module in model.named_modules():
        if isinstance(module, StoredLinear | StoredEmbedding):
            plain.get_submodule(path).weight.data = unpack(module.packed)
    experts = [random_adapter(BaseShapes.from_model(plain, "tiny"), 4, name) for name in "ab"]
    prompt = random_prompt(20)

    async def scenario() -> list[list[int]]:
        async with running(model, experts) as rig:
            mixtures: list[dict[str, float]] = [{}, {"a": 0.6, "b": 0.4}]
            answers = await asyncio.gather(*(rig.ask(prompt, mixture) for mixture in mixtures))
            return [answer.tokens for answer in answers]

    bare, mixed = asyncio.run(scenario())
    assert bare == greedy(plain, prompt, 24)
    assert mixed == greedy(with_delta(plain, [(experts[0], 0.6), (experts[1], 0.4)]), prompt, 24)
