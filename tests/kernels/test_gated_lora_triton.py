"""The Triton form against the formula in float64: compiled where there is a CUDA device, else interpreted."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is published for Linux on x86-64")

from loramux.kernels.gated_lora import Plan, gated_lora_reference, plan_step
from loramux.kernels.gated_lora.slots import SlotTable, UnionTable
from tests.kernels.batches import TRAFFIC, Segments, draw, gate_of, make_slots, rows_of, tokens_of, traffic

CUDA = torch.cuda.is_available()
if CUDA:
    from loramux.kernels.gated_lora import triton as form
    from loramux.kernels.gated_lora.cuda import TritonForm
else:
    with pytest.MonkeyPatch.context() as patch:  # a kernel is interpreted if this is set when it is defined
        patch.setenv("TRITON_INTERPRET", "1")
        from loramux.kernels.gated_lora import triton as form
        from loramux.kernels.gated_lora.cuda import TritonForm

DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
ROWS = 97

pytestmark = [
    # The interpreter computes in NumPy, which also looks at what a kernel reads and then masks out.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype).to(DEVICE)


def formula(y: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    return gated_lora_reference(*(tensor.double().cpu() for tensor in (y, x, a, b, gate)))


def error(out: Tensor, expected: Tensor) -> float:
    return float((out.double().cpu() - expected).norm() / expected.norm().clamp_min(1e-30))


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


class Problem:
    """Fresh factors of one module, and a batch with a few tokens of padding."""

    def __init__(
        self, segments: Segments, n_in: int, n_out: int, dtype: torch.dtype, rows: int = ROWS
    ) -> None:
        self.segments = segments
        self.padding = draw(0, 3)
        tokens = tokens_of(segments) + self.padding
        self.x = normal(tokens, n_in, dtype=dtype)
        self.y = normal(tokens, n_out, dtype=dtype)
        self.a = normal(rows, n_in, dtype=dtype, scale=n_in**-0.5)
        self.b = normal(rows, n_out, dtype=dtype, scale=0.2)
        self.gate = torch.cat([gate_of(segments, rows), torch.zeros(self.padding, rows)])

    @property
    def bare(self) -> Tensor:
        """Tokens without a slot."""
        slotted = [slot is not None for slot, length in self.segments for _ in range(length)]
        return ~torch.tensor([*slotted, *[False] * self.padding], dtype=torch.bool, device=DEVICE)

    def expected(self, factors: Tensor | None = None) -> Tensor:
        gate = self.gate if factors is None else self.gate * factors
        return formula(self.y, self.x, self.a, self.b, gate)

    def table(self, max_rank: int, extra: int = 0) -> SlotTable:
        table = SlotTable(max(1, self.x.shape[0] + extra), 8, max_rank, self.a.shape[0], DEVICE)
        table.fill(self.segments)
        return table


@pytest.mark.parametrize("kind", TRAFFIC)
def test_the_form_that_layers_use_equals_the_formula(kind: str) -> None:
    """One form over several plans, so that tables are filled again and taken in other sizes."""
    triton_form = TritonForm()
    slots = make_slots(6, ROWS, 64)
    for segments in (
        traffic(kind, slots),
        traffic("mixed with the base", slots),
        [(slots[0], 1), (None, 40)],
    ):
        problem = Problem(segments, 70, 50, torch.float32)
        out = problem.y.clone()
        bound = triton_form.bind(plan_step(segments), "m", problem.a, problem.b)
        if bound is not None:
            bound(out, problem.x)
        assert error(out, problem.expected()) < TOLERANCE[torch.float32]
        assert torch.equal(bits(out)[problem.bare], bits(problem.y)[problem.bare])
        assert triton_form.bind(plan_step(segments), "another", problem.a, problem.b) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TRAFFIC)
def test_equals_the_formula_under_all_traffic(kind: str, dtype: torch.dtype) -> None:
    problem = Problem(traffic(kind, make_slots(6, ROWS, 64)), draw(100, 140), draw(60, 150), dtype)
    out = problem.y.clone()
    form.gated_lora_(out, problem.x, problem.a, problem.b, problem.table(64, extra=draw(0, 9)))
    assert error(out, problem.expected()) < TOLERANCE[dtype]
    assert torch.equal(bits(out)[problem.bare], bits(problem.y)[problem.bare])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["distinct", "zipf", "mixed with the base"])
def test_a_table_of_all_rows_together_says_the_same(kind: str, dtype: torch.dtype) -> None:
    segments = [(slot, min(1, length)) for slot, length in traffic(kind, make_slots(6, ROWS, 16))]
    problem = Problem(segments, 90, 50, dtype)
    tokens = problem.x.shape[0]
    table = UnionTable(tokens, ROWS + 3, ROWS, DEVICE)
    out = problem.y.clone()
    bound = TritonForm().bind(Plan(table=table), "m", problem.a, problem.b)
    assert bound is not None
    table.fill([(slot, 1) for slot, _ in segments[:1]])
    table.fill(segments)  # as before every replay
    bound(out, problem.x)
    assert error(out, problem.expected()) < TOLERANCE[dtype]
    assert torch.equal(bits(out)[problem.bare], bits(problem.y)[problem.bare])


@pytest.mark.parametrize("modules", [2, 3, 5])
def test_modules_that_share_their_input_are_each_what_they_are_alone(modules: int) -> None:
    segments = traffic("zipf", make_slots(6, ROWS, 16))
    problem = Problem(segments, 90, 50, torch.float32)
    tokens = problem.x.shape[0]
    widths = [draw(1, 200) for _ in range(modules)]
    a = [normal(ROWS, 90, scale=0.1) for _ in widths]
    b = [normal(ROWS, width, scale=0.2) for width in widths]
    ys = [normal(tokens, width) for width in widths]
    outs = [y.clone() for y in ys]
    form.gated_lora_all_(outs, problem.x, a, b, problem.table(16))
    for one, y, factor_a, factor_b in zip(outs, ys, a, b, strict=True):
        assert error(one, formula(y, problem.x, factor_a, factor_b, problem.gate)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n_in", "n_out", "max_rank", "rows"),
    [
        (1, 1, 1, 3),
        (33, 7, 5, ROWS),
        (64, 48, 16, ROWS),
        (600, 129, 17, ROWS),  # two parts of the input axis
        (257, 64, 150, 200),  # concatenated experts: several blocks of rows
    ],
)
def test_equals_the_formula_at_odd_sizes(
    n_in: int, n_out: int, max_rank: int, rows: int, dtype: torch.dtype
) -> None:
    segments = traffic("zipf", make_slots(6, rows, max_rank))
    problem = Problem([*segments, (None, 2)], n_in, n_out, dtype, rows)
    out = problem.y.clone()
    form.gated_lora_(out, problem.x, problem.a, problem.b, problem.table(max_rank))
    assert error(out, problem.expected()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_tiles_equal_the_formula(dtype: torch.dtype) -> None:
    problem = Problem(traffic("prefill beside decodes", make_slots(3, ROWS, 20), 150), 70, 40, dtype)
    out = problem.y.clone()
    table = problem.table(20, extra=512)
    assert table.tile > 16
    form.gated_lora_(out, problem.x, problem.a, problem.b, table)
    assert error(out, problem.expected()) < TOLERANCE[dtype]


@pytest.mark.parametrize("modules", [2, 3, 5])
def test_one_shrink_serves_all_modules_of_an_input(modules: int) -> None:
    problem = Problem(traffic("mixed with the base", make_slots(3, ROWS, 40)), 50, 30, torch.float32)
    table = problem.table(40)
    a = [normal(ROWS, 50) for _ in range(modules)]
    hidden = form.shrink(problem.x, a, table)
    assert hidden.shape == (modules, form.parts_of(table, modules, 50), problem.x.shape[0], 40)
    for i in range(modules):
        problem.a, problem.b = a[i], normal(ROWS, 20 + i)
        problem.y = normal(problem.x.shape[0], 20 + i)
        out = problem.y.clone()
        form.expand_(out, hidden[i], problem.b, table)
        assert error(out, problem.expected()) < TOLERANCE[torch.float32]


def test_the_ungated_hidden_values_are_there_for_a_router() -> None:
    problem = Problem(traffic("mixed with the base", make_slots(3, ROWS, 40)), 600, 30, torch.float32)
    table = problem.table(40)
    hidden = form.shrink(problem.x, [problem.a], table)
    assert hidden.shape[1] > 1
    whole = form.total(hidden)[0].cpu()
    exact = problem.x.double().cpu() @ problem.a.double().cpu().T
    at = 0
    for slot, length in problem.segments:
        if slot is not None:
            rows = rows_of(slot)
            assert error(whole[at : at + length, : len(rows)], exact[at : at + length, rows]) < 2e-6
        at += length


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gate_per_token_and_rank_multiplies_the_factors_of_the_slot(dtype: torch.dtype) -> None:
    problem = Problem(traffic("mixed with the base", make_slots(3, ROWS, 40)), 50, 30, dtype)
    table = problem.table(40)
    gate = torch.full((problem.x.shape[0], 40), float("nan"))  # what lies beyond a slot's rank is not used
    factors = torch.zeros(problem.x.shape[0], ROWS, dtype=torch.float64)
    at = 0
    for slot, length in problem.segments:
        if slot is not None:
            rows = rows_of(slot)
            gate[at : at + length, : len(rows)] = torch.rand(length, len(rows))
            factors[at : at + length, rows] = gate[at : at + length, : len(rows)].double()
        at += length
    out = problem.y.clone()
    form.expand_(out, form.shrink(problem.x, [problem.a], table)[0], problem.b, table, gate.to(DEVICE))
    assert error(out, problem.expected(factors)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gate_per_token_and_block_multiplies_the_factors_of_the_slot(dtype: torch.dtype) -> None:
    problem = Problem(traffic("mixed with the base", make_slots(3, ROWS, 40)), 50, 30, dtype)
    table = problem.table(40)
    blocks = torch.randint(-1, 4, (8, 40), dtype=torch.int32)
    values = torch.rand(problem.x.shape[0], 4)
    factors = torch.zeros(problem.x.shape[0], ROWS, dtype=torch.float64)
    at = 0
    for slot, length in problem.segments:
        if slot is not None:
            index, rows = int(table.slots[at]), rows_of(slot)
            for row, block in zip(rows, blocks[index].tolist(), strict=False):
                factors[at : at + length, row] = values[at : at + length, block] if block >= 0 else 1
        at += length
    out = problem.y.clone()
    gate = form.BlockGate(values.to(DEVICE), blocks.to(DEVICE))
    form.expand_(out, form.shrink(problem.x, [problem.a], table)[0], problem.b, table, gate)
    assert error(out, problem.expected(factors)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_that_a_token_does_not_use_reaches_it(dtype: torch.dtype) -> None:
    """NaN in the rows nobody uses, in the input and output of bare tokens, next to y, and in fresh memory."""
    problem = Problem(traffic("mixed with the base", make_slots(3, ROWS, 20)), 50, 30, dtype)
    expected = problem.expected()
    unused = (problem.gate == 0).all(dim=0).to(DEVICE)
    nan = float("nan")
    problem.a[unused], problem.b[unused] = nan, nan
    problem.x[problem.bare], problem.y[problem.bare] = nan, nan
    wide = torch.full((problem.y.shape[0], 50), nan, dtype=dtype, device=DEVICE)
    wide[:, :30] = problem.y
    before = wide.clone()
    torch.use_deterministic_algorithms(True)  # what is allocated now holds NaN
    try:
        form.gated_lora_(wide[:, :30], problem.x, problem.a, problem.b, problem.table(20))
    finally:
        torch.use_deterministic_algorithms(False)
    used = ~problem.bare
    assert error(wide[used, :30], expected[used.cpu()]) < TOLERANCE[dtype]
    assert torch.equal(bits(wide)[problem.bare], bits(before)[problem.bare])
    assert torch.equal(bits(wide)[:, 30:], bits(before)[:, 30:])


def test_rows_may_lie_apart() -> None:
    """Views into wider tensors, as a fused projection or a flat arena gives them."""
    problem = Problem(traffic("zipf", make_slots(6, ROWS, 20)), 50, 30, torch.float32)
    for name in ["x", "y", "a", "b"]:
        narrow = getattr(problem, name)
        wide = normal(narrow.shape[0], narrow.shape[1] + 11)
        wide[:, 4 : 4 + narrow.shape[1]] = narrow
        setattr(problem, name, wide[:, 4 : 4 + narrow.shape[1]])
    expected = problem.expected()
    form.gated_lora_(problem.y, problem.x, problem.a, problem.b, problem.table(20))
    assert error(problem.y, expected) < TOLERANCE[torch.float32]


def test_a_refilled_table_serves_the_next_batch() -> None:
    slots = make_slots(6, ROWS, 30)
    table = SlotTable(90, 6, 30, ROWS, DEVICE)
    for kind in TRAFFIC:
        problem = Problem(traffic(kind, slots), 50, 30, torch.float32)
        out = problem.y.clone()
        table.fill(problem.segments)
        form.gated_lora_(out, problem.x, problem.a, problem.b, table)
        assert error(out, problem.expected()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": normal(2, 8)}, "x has shape.*3 tokens"),
        ({"x": normal(9, 8)}, "room for 8"),
        ({"x": normal(3, 8).double()}, "x is torch.float64"),
        ({"x": normal(8, 3).T}, "the rows of x are not contiguous"),
        ({"a": normal(5, 8)}, r"A has shape \(5, 8\), expected \[at least 6, 8\]"),
        ({"a": normal(6, 7)}, "A has shape"),
        ({"a": normal(6, 8, dtype=torch.float16)}, "A is torch.float16, the tokens are torch.float32"),
        ({"b": normal(6, 5)}, r"B has shape \(6, 5\)"),
        ({"y": normal(4, 4)}, "hidden is torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], words: str) -> None:
    table = SlotTable(8, 2, 4, 6, DEVICE)
    table.fill([(None, 3)])
    given = {"y": normal(3, 4), "x": normal(3, 8), "a": normal(6, 8), "b": normal(6, 4), **change}
    with pytest.raises(ValueError, match=words):
        form.gated_lora_(given["y"], given["x"], given["a"], given["b"], table)


def test_a_gate_that_does_not_fit_is_refused() -> None:
    table = SlotTable(8, 2, 4, 6, DEVICE)
    y, b, hidden = normal(3, 4), normal(6, 4), torch.zeros(1, 3, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"the gate is torch\.float32"):
        form.expand_(y, hidden, b, table, normal(3, 5))
    with pytest.raises(ValueError, match="the blocks of a gate"):
        form.expand_(y, hidden, b, table, form.BlockGate(normal(3, 5), torch.zeros(2, 4, device=DEVICE)))
    with pytest.raises(ValueError, match="share their row stride"):
        form.shrink(normal(3, 8), [normal(6, 8), normal(6, 9)[:, :8]], table)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_captured_graph_replays_with_every_batch(dtype: torch.dtype) -> None:
    slots = make_slots(6, ROWS, 64)
    table = SlotTable(96, 6, 64, ROWS, DEVICE)
    x, a = normal(96, 600, dtype=dtype), [normal(ROWS, 600, dtype=dtype, scale=0.04) for _ in range(2)]
    y, b = (
        [normal(96, 130 + i, dtype=dtype) for i in range(2)],
        [normal(ROWS, 130 + i, dtype=dtype) for i in range(2)],
    )

    def step() -> None:
        hidden = form.shrink(x, a, table)
        for i in range(2):
            form.expand_(y[i], hidden[i], b[i], table)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for kind in TRAFFIC:
        segments = traffic(kind, slots)
        gate = torch.cat([gate_of(segments, ROWS), torch.zeros(96 - tokens_of(segments), ROWS)])
        x.copy_(normal(96, 600, dtype=dtype))
        expected = [formula(y[i], x, a[i], b[i], gate) for i in range(2)]
        table.fill(segments)
        graph.replay()
        for i in range(2):
            assert error(y[i], expected[i]) < TOLERANCE[dtype]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tokens", [16, 2048])
@pytest.mark.parametrize(("n_in", "n_out"), [(4096, 4096), (4096, 11008), (11008, 4096)])
def test_the_shapes_of_a_7b_model(tokens: int, n_in: int, n_out: int) -> None:
    slots = make_slots(8, 400, 48)
    segments: Segments = [(slot, tokens // 8) for slot in slots]
    problem = Problem(segments, n_in, n_out, torch.bfloat16, 400)
    out = problem.y.clone()
    form.gated_lora_(out, problem.x, problem.a, problem.b, problem.table(48))
    assert error(out, problem.expected()) < TOLERANCE[torch.bfloat16]
