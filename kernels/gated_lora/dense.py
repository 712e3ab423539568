"""The operator as a few dense products per layer, over the rows that are in use and no others.

Works on every device and dtype: the form of last resort, and the better one for many tokens of one request.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from loramux.kernels.gated_lora.form import Bound, BoundAll, bind_each
from loramux.kernels.gated_lora.gate_slot import Extent, GateSlot
from loramux.kernels.gated_lora.plan import BARE, LONG_SEGMENT, Plan, Segment


@dataclass(frozen=True, eq=False)
class Run:
    """One dense piece of work: `tokens` x `rows`, with a gate of shape [tokens, rows] or [rows]."""

    tokens: slice
    rows: slice
    gate: Tensor
    modules: frozenset[str]


class DenseForm:
    """Long segments multiply their own rows; short ones share a dense gate over the union of theirs, because
    at a handful of tokens the number of calls costs more than the rows that are multiplied by zero."""

    shares_inputs = False
    takes_tables = False

    def __init__(self) -> None:
        self._plan = BARE
        self._runs: list[Run] = []

    def bind(self, plan: Plan, module: str, a: Tensor, b: Tensor) -> Bound | None:
        if plan is not self._plan:
            self._runs = dense_runs(plan.segments, a.device)
            self._plan = plan
        return bind_runs(self._runs, module, a, b)

    def bind_all(
        self, plan: Plan, modules: Sequence[str], a: Sequence[Tensor], b: Sequence[Tensor]
    ) -> BoundAll | None:
        return bind_each(self, plan, modules, a, b)


def bind_runs(runs: Sequence[Run], module: str, a: Tensor, b: Tensor) -> Bound | None:
    """Look up a module's rows of a [R, in] and b [R, out], without copying them."""
    pieces = [(run.tokens, a[run.rows], run.gate, b[run.rows]) for run in runs if module in run.modules]
    if not pieces:
        return None

    def apply(y: Tensor, x: Tensor) -> None:
        x, y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for tokens, rows_a, gate, rows_b in pieces:
            hidden = linear(x[tokens], rows_a)  # [t, r]
            if hidden.dtype == gate.dtype:
                hidden.mul_(gate)
            else:  # the gate is applied in float32 whatever the dtype of the factors
                hidden = (hidden * gate).to(rows_b.dtype)
            y[tokens].addmm_(hidden, rows_b)

    return apply


def dense_runs(segments: Sequence[Segment], device: torch.device) -> list[Run]:
    """Cut the segments of a batch into runs."""
    runs: list[Run] = []
    short: list[Segment] = []
    for segment in segments:
        if short and segment.start - short[-1].tokens.stop >= LONG_SEGMENT:  # many tokens of others between
            runs += _short_runs(short, device)
            short = []
        if segment.is_long:
            runs += _slot_runs(segment.slot, segment.tokens, device)
        else:
            short.append(segment)
    return runs + _short_runs(short, device)


def _slot_runs(slot: GateSlot, tokens: slice, device: torch.device) -> list[Run]:
    """The rows of one slot for one stretch of tokens: the gate is the same for every token."""
    runs: list[tuple[Extent, list[Tensor]]] = []
    for (lo, hi), gate in slot.parts():
        if runs and runs[-1][0][1] == lo:  # neighbours become one product
            runs[-1] = ((runs[-1][0][0], hi), [*runs[-1][1], gate])
        else:
            runs.append(((lo, hi), [gate]))
    return [Run(tokens, slice(lo, hi), torch.cat(gates).to(device), slot.modules) for (lo, hi), gates in runs]


def _short_runs(segments: Sequence[Segment], device: torch.device) -> list[Run]:
    """A dense gate over the rows that any of these requests uses, from the first one's tokens to the
    last's."""
    if not segments:
        return []
    first = segments[0].start
    tokens = slice(first, segments[-1].tokens.stop)
    length = tokens.stop - first
    slots = {id(segment.slot): segment.slot for segment in segments}
    if len(slots) == 1 and length == sum(segment.length for segment in segments):
        return _slot_runs(segments[0].slot, tokens, device)
    extents = _union([extent for slot in slots.values() for extent in slot.extents])
    modules = frozenset[str]().union(*(slot.modules for slot in slots.values()))
    gates = [torch.zeros(length, hi - lo) for lo, hi in extents]
    for segment in segments:
        at = slice(segment.start - first, segment.start - first + segment.length)
        for (lo, hi), part in segment.slot.parts():
            for (run_lo, run_hi), gate in zip(extents, gates, strict=True):
                if run_lo <= lo and hi <= run_hi:
                    gate[at, lo - run_lo : hi - run_lo] = part
    return [
        Run(tokens, slice(lo, hi), gate.to(device), modules)
        for (lo, hi), gate in zip(extents, gates, strict=True)
    ]


def _union(extents: Sequence[Extent]) -> list[Extent]:
    """The fewest ranges that cover the given ones and nothing else, in rising order."""
    union: list[Extent] = []
    for lo, hi in sorted(extents):
        if union and lo <= union[-1][1]:
            union[-1] = (union[-1][0], max(hi, union[-1][1]))
        else:
            union.append((lo, hi))
    return union
