"""Every form of a decode step's attention against the formula in float64, over random pages and lengths."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from loramux.kernels.paged_attention import (
    Form,
    GatheredForm,
    NativeForm,
    Rows,
    Scores,
    attention_reference,
    paged_attention_reference,
    prompt_attention,
)
from loramux.kernels.paged_attention.native import library

CUDA = torch.cuda.is_available()
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass
class Case:
    """A cache with rows of random lengths on random pages, and their new tokens."""

    query: Tensor
    key: Tensor
    value: Tensor
    keys: Tensor
    values: Tensor
    rows: Rows

    def wide(self) -> "Case":
        parts = (self.query, self.key, self.value, self.keys, self.values)
        query, key, value, keys, values = (part.to("cpu", torch.float64) for part in parts)
        rows = Rows(self.rows.tables.cpu(), self.rows.lengths.cpu(), self.rows.slots.cpu())
        return Case(query, key, value, keys, values, rows)

    def run(self, form: Form, scores: Scores) -> Tensor:
        return form.attend(self.query, self.key, self.value, self.keys, self.values, self.rows, scores)


def make_case(
    lengths: list[int], heads: int, kv_heads: int, dim: int, *, value_dim: int | None = None, page: int = 8,
    dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> Case:  # fmt: skip
    wide = value_dim or dim
    each = [-(-length // page) for length in lengths]
    pages = torch.randperm(sum(each) + 3)
    tables = torch.full((len(lengths), max(each) + 2), 2**30, dtype=torch.int32)  # what must not be read
    done = 0
    for row, count in enumerate(each):
        tables[row, :count] = pages[done : done + count]
        done += count
    last = torch.tensor(lengths) - 1
    slots = tables.long()[torch.arange(len(lengths)), last // page] * page + last % page
    kind = {"dtype": dtype, "device": device}
    return Case(
        torch.randn(len(lengths), heads, dim, **kind),
        torch.randn(len(lengths), kv_heads, dim, **kind),
        torch.randn(len(lengths), kv_heads, wide, **kind),
        torch.randn(len(pages), page, kv_heads, dim, **kind),
        torch.randn(len(pages), page, kv_heads, wide, **kind),
        Rows(tables.to(device), torch.tensor(lengths, dtype=torch.int32, device=device), slots.to(device)),
    )


def check(form: Form, case: Case, scores: Scores, tolerance: float | None = None) -> None:
    wide = case.wide()
    on_cpu = replace(scores, sinks=None if scores.sinks is None else scores.sinks.cpu())
    wanted = paged_attention_reference(
        wide.query, wide.key, wide.value, wide.keys, wide.values, wide.rows, on_cpu
    )
    found = case.run(form, scores)
    assert found.dtype == case.query.dtype
    error = (found.double().cpu() - wanted).norm() / wanted.norm()
    assert error <= (tolerance or TOLERANCE[case.query.dtype])
    assert torch.equal(case.keys.double().cpu(), wide.keys)  # stored exactly, and nothing else was written
    assert torch.equal(case.values.double().cpu(), wide.values)


def forms() -> list[str]:
    return ["gathered", "native", "triton"]


def make_form(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> tuple[Form, str]:
    if name == "gathered":
        return GatheredForm(), "cpu"
    if name == "native":
        if library() is None:
            pytest.skip("installed without a C++ compiler")
        if dtype == torch.float16:
            pytest.skip("the native form has no float16, and says so")
        return NativeForm(dtype), "cpu"
    pytest.importorskip("triton", reason="Triton is published for Linux on x86-64")
    if not CUDA:  # a kernel is interpreted if this is set when it is defined
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    from loramux.kernels.paged_attention.triton import TritonForm

    return TritonForm(), "cuda" if CUDA else "cpu"


SCORES = {
    "plain": {},
    "window": {"window": 11},
    "softcap": {"softcap": 2.5},
    "sinks": {"sinks": True},
    "all": {"window": 9, "softcap": 3.0, "sinks": True},
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", forms())
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_each_form_says_what_the_formula_says(
    name: str, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "triton" and not CUDA and dtype != torch.float32 and kind != "all":
        pytest.skip("the interpreter is slow, and widens what is narrower")
    form, device = make_form(name, dtype, monkeypatch)
    options = dict(SCORES[kind])
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(6, device=device)
    case = make_case([1, 8, 9, 40, 131], 6, 2, 16, dtype=dtype, device=device)
    check(form, case, Scores(0.3, **options))


@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "dim", "value_dim", "page"),
    [
        ([3], 1, 1, 8, 8, 1),
        ([70, 2], 4, 4, 40, 24, 32),
        ([5] * 9, 9, 3, 64, 64, 16),
        ([33, 1, 64], 8, 1, 128, 128, 32),
        ([7, 19], 4, 2, 12, 20, 4),  # no multiple of eight
        ([300], 5, 5, 16, 16, 8),
    ],
)
@pytest.mark.parametrize("name", forms())
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_odd_shapes(
    name: str, lengths: list[int], heads: int, kv_heads: int, dim: int, value_dim: int, page: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    form, device = make_form(name, torch.float32, monkeypatch)
    case = make_case(lengths, heads, kv_heads, dim, value_dim=value_dim, page=page, device=device)
    check(form, case, Scores(dim**-0.5))


@pytest.mark.skipif(library() is None, reason="installed without a C++ compiler")
def test_large_scores_overflow_nothing_and_one_row_of_nans_harms_no_other() -> None:
    case = make_case([40, 40], 4, 2, 16)
    case.query *= 1e3
    check(NativeForm(torch.float32), case, Scores(1.0), 1e-2)  # float32 scores of 1e3 have errors of 1e-4
    broken = make_case([40, 40], 4, 2, 16)
    broken.query[0] = float("nan")
    found = broken.run(NativeForm(torch.float32), Scores(1.0))
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


@pytest.mark.parametrize("q", [1, 5, 30])
@pytest.mark.parametrize("kind", SCORES)
def test_a_piece_of_a_prompt_sees_what_came_before_it(q: int, kind: str) -> None:
    options = dict(SCORES[kind])
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(6)
    scores = Scores(0.3, **options)
    query, keys, values = torch.randn(q, 6, 16), torch.randn(30, 2, 16), torch.randn(30, 2, 16)
    wanted = attention_reference(query.double(), keys.double(), values.double(), scores)
    assert torch.allclose(prompt_attention(query, keys, values, scores).double(), wanted, atol=2e-6)


@pytest.mark.skipif(library() is None, reason="installed without a C++ compiler")
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 16), (3, 3, 40), (8, 1, 64)])
def test_a_prompts_tokens_are_rows_and_get_what_they_get_one_by_one(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, kind: str
) -> None:
    """Bit by bit, in pieces of any size, beside another sequence that shares its first pages."""
    options = dict(SCORES[kind])
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(heads)
    scores, form, page, n, shared = Scores(0.3, **options), NativeForm(dtype), 8, 75, 16
    tables = torch.randperm(24).int().view(2, 12)[:, : -(-n // page)]
    tables[1, : shared // page] = tables[0, : shared // page]
    query, key, value = (torch.randn(2, n, count, dim, dtype=dtype) for count in (heads, kv_heads, kv_heads))
    for part in (key, value):  # what two prompts have in common lies in the same pages
        part[1, :shared] = part[0, :shared]

    def run(pieces: list[tuple[int, int]], beside: bool) -> Tensor:
        keys, values = (torch.zeros(24, page, kv_heads, dim, dtype=dtype) for _ in range(2))
        found = []
        for start, stop in pieces:
            at = torch.arange(start, stop)
            which = [0, 1] if beside else [0]
            slots = [tables[i].long()[at // page] * page + at % page for i in which]
            rows = Rows(
                torch.cat([tables[i].expand(len(at), -1) for i in which]),
                (at + 1).int().repeat(len(which)),
                torch.cat(slots),
            )
            packed = (torch.cat([part[i, at] for i in which]) for part in (query, key, value))
            found.append(form.attend(*packed, keys, values, rows, scores)[: len(at)])
        return torch.cat(found)

    alone = run([(t, t + 1) for t in range(n)], beside=False)
    wide = [part[0].double() for part in (query, key, value)]
    wanted = attention_reference(*wide, scores)
    assert (alone.double() - wanted).norm() / wanted.norm() <= TOLERANCE[dtype]
    for pieces in ([(0, n)], [(0, 7), (7, 8), (8, 50), (50, n)]):
        for beside in (False, True):
            assert torch.equal(run(pieces, beside), alone)
