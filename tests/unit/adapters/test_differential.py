"""What PEFT writes, damaged or not, is read here as PEFT reads it, or refused by name.

`FUZZ_EXAMPLES` sets how many adapters are tried (`make fuzz`); a failure prints the example and its seed.
"""

import copy
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import AdapterError
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.peft_format import read_lora
from tests.peft_kit import peft_logits
from tests.unit.adapters.differential import (
    DTYPES,
    Damage,
    configs,
    damage_config,
    damage_tensors,
    field_changes,
    three_layers,
    write_with_peft,
)

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
TOLERANCE = 1e-4
BASES = tuple(three_layers(biases=biases) for biases in (False, True))
SHAPES = tuple(BaseShapes.from_model(base, "tiny") for base in BASES)
TOKENS = torch.arange(1, 9)[None]


def _served_logits(base: LlamaForCausalLM, adapter: LoraAdapter) -> Tensor:
    model = copy.deepcopy(base)
    for path in adapter.pairs:
        weight = model.get_submodule(path).weight
        weight.data = (weight.double() + adapter.delta(path)).to(weight.dtype)
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
    return logits


def _written(directory: Path, base: LlamaForCausalLM, fields: dict[str, Any], dtype: torch.dtype) -> bool:
    try:
        write_with_peft(directory, copy.deepcopy(base), fields, dtype)
    except ValueError:  # nothing matches, or everything is excluded
        return False
    return True


def _check(directory: Path, which: int, damage: Damage | None) -> None:
    base = BASES[which]
    try:
        adapter = read_lora(directory, id="x", base=SHAPES[which], any_base=True)
    except AdapterError as error:
        refusal = str(error).removeprefix(str(directory))
        event("refused")
        if damage is None and "trained bias of the base" not in refusal:
            # PEFT sorts the patterns when it saves, so that it cannot always read what it wrote either.
            with pytest.raises(RuntimeError, match="size mismatch"):
                peft_logits(copy.deepcopy(base), directory, TOKENS)
        elif damage is not None and damage.culprits:
            assert any(name in refusal for name in (*damage.culprits, "trained bias")), (damage, refusal)
        return
    event("loaded")
    try:
        expected = peft_logits(copy.deepcopy(base), directory, TOKENS)
    except Exception as error:
        raise AssertionError(f"loaded here, but PEFT says: {type(error).__name__}: {error}") from error
    off = (expected - _served_logits(base, adapter)).abs().max()
    assert off <= TOLERANCE * max(1.0, float(expected.abs().max())), f"off by {off} after {damage}"


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    print_blob=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
@given(
    fields=configs(),
    which=st.integers(0, 1) | st.just(0),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    tensor_damage=st.none() | st.tuples(st.integers(0, 50), st.integers(0, 2**16)),
    changes=st.none() | st.none() | field_changes(),
)
def test_an_adapter_of_peft_is_served_as_peft_computes_it_or_refused_by_name(
    fields: dict[str, Any],
    which: int,
    dtype: torch.dtype,
    seed: int,
    tensor_damage: tuple[int, int] | None,
    changes: dict[str, Any] | None,
) -> None:
    torch.manual_seed(seed)
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        directory = Path(folder)
        try:
            assume(_written(directory, BASES[which], fields, dtype))
            damage = None
            if tensor_damage is not None:
                damage = damage_tensors(directory, *tensor_damage)
            if changes is not None:
                # Two damages may hide each other: then any refusal will do.
                damage = damage_config(directory, changes)
            _check(directory, which, damage)
        finally:
            logging.disable(logging.NOTSET)
