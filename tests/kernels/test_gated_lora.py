"""Every form of the CPU against the formula: fresh inputs, odd sizes, every kind of traffic."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from loramux.kernels.gated_lora import (
    DenseForm,
    Form,
    GateSlot,
    NativeForm,
    Plan,
    choose_form,
    dense_gate,
    gated_lora_reference,
    plan_step,
)
from loramux.kernels.gated_lora.native import FUNCTIONS, allow, library

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


def dense(_x: torch.dtype, _factors: torch.dtype) -> Form:
    return DenseForm()


@pytest.fixture(autouse=True)
def widest() -> Iterator[None]:
    yield
    allow(WIDEST)


def native(x: torch.dtype, factors: torch.dtype) -> Form:
    if library() is None:
        pytest.skip("installed without a C++ compiler: there is no native library")
    return NativeForm(x, factors)


def native_avx2(x: torch.dtype, factors: torch.dtype) -> Form:
    if allow(2) < 2:
        pytest.skip("no AVX2 here")
    return native(x, factors)


def native_baseline(x: torch.dtype, factors: torch.dtype) -> Form:
    allow(1)
    return native(x, factors)


WIDEST = 3
EVERY_NATIVE = (native, native_avx2, native_baseline)
CASES = [
    *((dense, dtype, dtype) for dtype in TOLERANCE),
    *((make, *dtypes) for make in EVERY_NATIVE for dtypes in FUNCTIONS),
]


@pytest.mark.parametrize(("make", "dtype", "factors"), CASES, ids=lambda p: getattr(p, "__name__", str(p)))
@pytest.mark.parametrize("kind", ["distinct", "identical", "base only", "skewed", "mixed"])
@pytest.mark.parametrize(("n_in", "n_out"), [(64, 48), (33, 7), (1, 129), (130, 1100)])
def test_equals_the_formula(
    make: Callable[[torch.dtype, torch.dtype], Form],
    dtype: torch.dtype,
    factors: torch.dtype,
    kind: str,
    n_in: int,
    n_out: int,
) -> None:
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    segments = traffic(kind, make_slots(generator, 5))
    tokens = sum(n for _, n in segments)
    plan = plan_step(segments)
    x = torch.randn(tokens, n_in, generator=generator).to(dtype)
    a = (torch.randn(ROWS, n_in, generator=generator) / n_in**0.5).to(factors)
    b = (torch.randn(ROWS, n_out, generator=generator) / 8).to(factors)
    y = torch.randn(tokens, n_out, generator=generator).to(dtype)

    expected = gated_lora_reference(
        y.double(), x.double(), a.double(), b.double(), dense_gate(plan, tokens, ROWS)
    )
    out = y.clone()
    apply(make(dtype, factors), plan, out, x, a, b)

    error = (out.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype]


def apply(form: Form, plan: Plan, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    bound = form.bind(plan, "m", a, b)
    if bound is not None:
        bound(y, x)


@pytest.mark.parametrize("make", [dense, *EVERY_NATIVE])
def test_one_token_alone(make: Callable[[torch.dtype, torch.dtype], Form]) -> None:
    """The decode step of a single request takes a way of its own through the library."""
    slot = GateSlot(((3, 10), (50, 82)), torch.randn(39), frozenset({"m"}))
    x, y = torch.randn(1, 77), torch.randn(1, 2500)
    a, b = torch.randn(ROWS, 77), torch.randn(ROWS, 2500)
    plan = plan_step([(slot, 1)])
    expected = gated_lora_reference(y.double(), x.double(), a.double(), b.double(), dense_gate(plan, 1, ROWS))
    apply(make(torch.float32, torch.float32), plan, y, x, a, b)
    assert (y.double() - expected).norm() / expected.norm() < TOLERANCE[torch.float32]


def test_the_library_is_what_a_cpu_gets_where_it_was_built() -> None:
    chosen = choose_form(torch.device("cpu"), torch.float32, torch.float32)
    assert isinstance(chosen, DenseForm if library() is None else NativeForm)
    assert isinstance(choose_form(torch.device("cpu"), torch.float16, torch.float16), DenseForm)


def test_the_library_refuses_what_it_has_no_kernel_for() -> None:
    with pytest.raises(RuntimeError, match="float16"):
        NativeForm(torch.float16, torch.float16)


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
    assert torch.equal(dense_gate(plan_step(segments), tokens, ROWS), expected)


@pytest.mark.parametrize("make", [dense, *EVERY_NATIVE])
def test_rows_of_others_never_reach_a_token(make: Callable[[torch.dtype, torch.dtype], Form]) -> None:
    """NaN in every row that the batch does not use, and zero in the output of the tokens it does not
    touch."""
    slot = GateSlot(((4, 8), (20, 23)), torch.ones(7), frozenset({"m"}))
    a, b = torch.full((ROWS, 8), float("nan")), torch.full((ROWS, 8), float("nan"))
    for lo, hi in slot.extents:
        a[lo:hi], b[lo:hi] = torch.randn(hi - lo, 8), torch.randn(hi - lo, 8)
    y = torch.zeros(6, 8)
    plan = plan_step([(None, 2), (slot, 2), (None, 2)])
    apply(make(torch.float32, torch.float32), plan, y, torch.randn(6, 8), a, b)
    assert torch.isfinite(y).all()
    assert (y[:2] == 0).all()
    assert (y[4:] == 0).all()
    assert (y[2:4] != 0).all()


def test_a_batch_without_adapters_has_an_empty_plan() -> None:
    assert plan_step([(None, 1), (None, 30)]).is_empty


@pytest.mark.parametrize("make", [dense, *EVERY_NATIVE])
def test_a_module_that_no_adapter_targets_is_left_alone(
    make: Callable[[torch.dtype, torch.dtype], Form],
) -> None:
    slot = GateSlot(((0, 4),), torch.ones(4), frozenset({"attention"}))
    factors = torch.randn(ROWS, 8)
    form = make(torch.float32, torch.float32)
    plan = plan_step([(slot, 1)])
    assert form.bind(plan, "attention", factors, factors) is not None
    assert form.bind(plan, "mlp", factors, factors) is None


def test_a_gate_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="5 rows"):
        GateSlot(((0, 5),), torch.ones(4), frozenset())


@pytest.mark.skipif(library() is None, reason="the package was installed without a C++ compiler")
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n_in", "n_out"), [(64, 48), (33, 7), (1, 129), (130, 300)])
def test_what_a_token_gets_depends_neither_on_the_others_nor_on_where_rows_were_free(
    n_in: int, n_out: int, factors: torch.dtype
) -> None:
    """Bit by bit, in single tokens, segments and on any number of threads; rows lie as in another arena."""
    names, rank, form = "dacb", 5, NativeForm(torch.float32, factors)
    a, b = torch.randn(len(names), rank, n_in), torch.randn(len(names), rank, n_out)
    x, y = torch.randn(61, n_in), torch.randn(61, n_out)
    weights = torch.randn(4, len(names))

    def slots(starts: list[tuple[int, int]]) -> list[GateSlot]:
        """An expert in two stretches of rows, as an arena gives them out where little is free."""
        extents = [((first, first + 2), (rest, rest + rank - 2)) for first, rest in starts]
        return [
            GateSlot(
                tuple(extent for number in used for extent in extents[number]),
                torch.cat([weights[slot, number].expand(rank) for number in used]),
                frozenset({"m"}),
                tuple(names[number] for number in used for _ in range(2)),
            )
            for slot, used in enumerate([(0,), (1, 2), (2, 3, 0), (3, 1)])
        ]

    def run(at: list[tuple[int, int]], segments: list[tuple[int, int, int]]) -> torch.Tensor:
        """What (slot, start, stop) get, packed."""
        stacked_a, stacked_b = torch.zeros(40, n_in), torch.zeros(40, n_out)
        for number, (first, rest) in enumerate(at):
            rows = [first, first + 1, *range(rest, rest + rank - 2)]
            stacked_a[rows], stacked_b[rows] = a[number], b[number]
        made = slots(at)
        plan = plan_step([(made[slot], stop - start) for slot, start, stop in segments])
        tokens = [token for _, start, stop in segments for token in range(start, stop)]
        found = y[tokens].clone()
        apply(form, plan, found, x[tokens], stacked_a.to(factors), stacked_b.to(factors))
        return found

    neighbours = [(10 * n, 10 * n + 2) for n in range(4)]
    elsewhere = [(30, 37), (3, 20), (0, 12), (25, 33)]
    of = torch.randint(4, (61,)).tolist()
    alone = torch.cat([run(neighbours, [(slot, t, t + 1)]) for t, slot in enumerate(of)])
    usual = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            for at in (neighbours, elsewhere):
                assert torch.equal(run(at, [(slot, t, t + 1) for t, slot in enumerate(of)]), alone)
                long = run(at, [(2, 0, 40), (1, 40, 61)])
                cut = [run(at, [(2, t, t + 1)]) for t in range(40)] + [run(at, [(1, 40, 47)])]
                assert torch.equal(long[:47], torch.cat(cut))
        finally:
            torch.set_num_threads(usual)
