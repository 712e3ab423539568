"""The planned, in-place form against the formula: fresh inputs, odd sizes, every kind of traffic."""

import itertools

import pytest
import torch

from loramux.kernels.gated_lora import (
    GateSlot,
    bind,
    dense_gate,
    gated_lora_,
    gated_lora_reference,
    plan_runs,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
ROWS = 97


def make_slots(generator: torch.Generator, count: int) -> list[GateSlot]:
    """Slots over shared and separate rows, with ranks 1 to 64 and rows that are not neighbours."""
    slots = []
    for _ in range(count):
        extents = []
        for _ in range(int(torch.randint(1, 4, (1,), generator=generator))):
            rank = int(torch.randint(1, 33, (1,), generator=generator))
            lo = int(torch.randint(0, ROWS - rank + 1, (1,), generator=generator))
            if all(hi <= lo or lo + rank <= start for start, hi in extents):
                extents.append((lo, lo + rank))
        gate = torch.randn(sum(hi - lo for lo, hi in extents), generator=generator)
        slots.append(GateSlot(tuple(extents), gate, frozenset({"m"})))
    return slots


def traffic(kind: str, slots: list[GateSlot]) -> list[tuple[GateSlot | None, int]]:
    lengths = [1, 1, 3, 1, 17, 1, 40, 1, 2, 15, 16, 1]
    picks: dict[str, list[GateSlot | None]] = {
        "distinct": list(slots),
        "identical": [slots[0]],
        "base only": [None],
        "skewed": [slots[0], slots[0], None, slots[1], slots[0]],
        "mixed": [None, *slots, None],
    }
    return list(zip(itertools.cycle(picks[kind]), lengths, strict=False))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["distinct", "identical", "base only", "skewed", "mixed"])
@pytest.mark.parametrize(("n_in", "n_out"), [(64, 48), (33, 7), (1, 129)])
def test_equals_the_formula(dtype: torch.dtype, kind: str, n_in: int, n_out: int) -> None:
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    segments = traffic(kind, make_slots(generator, 5))
    tokens = sum(n for _, n in segments)
    plan = plan_runs(segments)
    x = torch.randn(tokens, n_in, generator=generator).to(dtype)
    a = torch.randn(ROWS, n_in, generator=generator).to(dtype) / n_in**0.5
    b = torch.randn(ROWS, n_out, generator=generator).to(dtype) / 8
    y = torch.randn(tokens, n_out, generator=generator).to(dtype)

    expected = gated_lora_reference(
        y.double(), x.double(), a.double(), b.double(), dense_gate(plan.runs, tokens, ROWS)
    )
    out = y.clone()
    gated_lora_(out, x, bind(plan.of("m"), a, b))

    error = (out.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["distinct", "identical", "skewed", "mixed"])
def test_the_plan_gates_exactly_what_each_request_asked_for(kind: str) -> None:
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    segments = traffic(kind, make_slots(generator, 5))
    tokens = sum(n for _, n in segments)
    expected = torch.zeros(tokens, ROWS)
    at = 0
    for slot, n in segments:
        if slot is not None:
            done = 0
            for lo, hi in slot.extents:
                expected[at : at + n, lo:hi] = slot.gate[done : done + hi - lo]
                done += hi - lo
        at += n
    assert torch.equal(dense_gate(plan_runs(segments).runs, tokens, ROWS), expected)


def test_rows_of_others_never_reach_a_token() -> None:
    """NaN in every row that the batch does not use, and in the output of the tokens it does not touch."""
    slot = GateSlot(((4, 8), (20, 23)), torch.ones(7), frozenset({"m"}))
    a, b = torch.full((ROWS, 8), float("nan")), torch.full((ROWS, 8), float("nan"))
    for lo, hi in slot.extents:
        a[lo:hi], b[lo:hi] = torch.randn(hi - lo, 8), torch.randn(hi - lo, 8)
    y = torch.zeros(6, 8)
    plan = plan_runs([(None, 2), (slot, 2), (None, 2)])
    gated_lora_(y, torch.randn(6, 8), bind(plan.of("m"), a, b))
    assert torch.isfinite(y).all()
    assert (y[:2] == 0).all()
    assert (y[4:] == 0).all()
    assert (y[2:4] != 0).all()


def test_a_batch_without_adapters_has_no_runs() -> None:
    assert plan_runs([(None, 1), (None, 30)]).is_empty


def test_a_module_that_no_adapter_targets_has_no_runs() -> None:
    slot = GateSlot(((0, 4),), torch.ones(4), frozenset({"attention"}))
    plan = plan_runs([(slot, 1)])
    assert plan.of("attention")
    assert not plan.of("mlp")


def test_a_gate_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="5 rows"):
        GateSlot(((0, 5),), torch.ones(4), frozenset())
