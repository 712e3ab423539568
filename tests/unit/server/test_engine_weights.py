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
from loramux.server.engine.weights import FULL, HALVES, QUANTIZED, choose_full, choose_weights
from tests.tiny import greedy, random_adapter, random_prompt, running, tiny_llama, with_delta


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Microseconds in float32 and as stored, which the measurement is made to find; of several tokens, where
    there are two more, those."""
    found = [10.0, 5.0]

    def time(rows: int, columns: int, _: Kind, tokens: int = 1) -> Timing:
        plain, stored = found[-2:] if tokens > 1 else found[:2]
        return Timing(rows, columns, plain / 1e6, stored / 1e6)

    monkeypatch.setattr(weights, "time_product", time)
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


def test_float32_is_read_as_it_lies_where_one_and_many_gain_together(timing: list[float]) -> None:
    timing[:] = [10.0, 5.0, 10.0, 15.0]
    choice = choose_full((64, 32))
    assert choice.kinds == FULL
    assert choice.why.startswith("weights in float32, as asked for; read as they lie: 2.00 times as fast")
    assert choose_weights(torch.float32, (64, 32)).kinds == choose_weights(None, (64, 32)).kinds == FULL
    timing[:] = [10.0, 5.0, 10.0, 30.0]
    assert choose_full((64, 32)).kinds is None
    assert choose_full((64, 32)).why.endswith(
        "read in a layout: 2.00 times as fast for one token as oneDNN's layout, 0.33 for 16"
    )


def test_what_would_change_answers_is_not_chosen(timing: list[float]) -> None:
    for kinds in HALVES.values():
        assert {kinds.linear, kinds.embedding} <= {Kind.BF16, Kind.F16}


def test_without_the_library_weights_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "library", lambda: None)
    assert choose_weights(torch.bfloat16, (64, 32)).kinds is None
    assert choose_full((64, 32)).kinds is None


@pytest.mark.skipif(library() is None, reason="installed without a C++ compiler")
def test_the_measurement_measures() -> None:
    timing = time_product(100, 70, Kind.BF16)
    assert timing[:2] == (100, 70)
    assert 0 < timing.stored < 1
    assert 0 < timing.plain < 1


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4"])
def test_a_base_with_stored_weights_serves_mixtures(tmp_path: Path, form: str) -> None:
    """The oracle is a float32 model of the widened weights with the delta added in."""
    tiny_llama().bfloat16().save_pretrained(tmp_path)
    model = load_base(tmp_path, dtype="stored", device="cpu")
    plain: Any = tiny_llama()
    plain.load_state_dict(load_base(tmp_path, dtype="float32", device="cpu").state_dict())
    store_weights(model, {**QUANTIZED, "float32": FULL}.get(form) or HALVES[torch.bfloat16])
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
