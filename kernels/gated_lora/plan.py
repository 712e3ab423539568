"""Which tokens of a batch meet which rows of the stacked factors: decided once a step, used by every
layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

Extent = tuple[int, int]

#: From this many tokens on, a request gets matrix products over its own rows alone; shorter ones share a
#: dense gate, because at a handful of tokens the number of calls costs more than the rows that are multiplied
#: by zero.
LONG_SEGMENT = 16


@dataclass(frozen=True, eq=False)
class GateSlot:
    """Where one resident blend lives in the stacked factors.

    `extents` are half-open row ranges; `gate` holds one float32 factor per row of their concatenation;
    `modules` are the module paths in which any of these rows is non-zero.
    """

    extents: tuple[Extent, ...]
    gate: Tensor
    modules: frozenset[str]

    def __post_init__(self) -> None:
        rows = sum(hi - lo for lo, hi in self.extents)
        if self.gate.shape != (rows,):
            raise ValueError(f"gate has shape {tuple(self.gate.shape)}, the extents hold {rows} rows")


@dataclass(frozen=True, eq=False)
class Run:
    """One dense piece of work: `tokens` x `rows`, with a gate of shape [tokens, rows] or [rows]."""

    tokens: slice
    rows: slice
    gate: Tensor
    modules: frozenset[str]


@dataclass(frozen=True, eq=False)
class Plan:
    """All runs of a step, and those of one module. An empty plan is a batch of the bare base."""

    runs: tuple[Run, ...] = ()
    _by_module: dict[str, tuple[Run, ...]] = field(default_factory=dict)

    @cached_property
    def is_empty(self) -> bool:
        return not self.runs

    def of(self, module: str) -> tuple[Run, ...]:
        """The runs in which some row of `module` is non-zero."""
        runs = self._by_module.get(module)
        if runs is None:
            runs = tuple(run for run in self.runs if module in run.modules)
            self._by_module[module] = runs
        return runs


def plan_runs(segments: Sequence[tuple[GateSlot | None, int]], device: torch.device | str = "cpu") -> Plan:
    """Cut a packed batch into runs.

    Args:
        segments: (slot, number of tokens) of each request, in the order of the packed tokens; `None` is the
            bare base.
        device: where the gates are needed.
    """
    runs: list[Run] = []
    short: list[tuple[GateSlot | None, int]] = []
    start = short_start = 0
    for slot, length in segments:
        if length < LONG_SEGMENT:
            short.append((slot, length))
        else:
            runs += _short_runs(short, short_start, device)
            if slot is not None:
                runs += _slot_runs(slot, slice(start, start + length), device)
            short, short_start = [], start + length
        start += length
    runs += _short_runs(short, short_start, device)
    return Plan(tuple(runs))


def _slot_runs(slot: GateSlot, tokens: slice, device: torch.device | str) -> list[Run]:
    """The rows of one slot for one stretch of tokens: the gate is the same for every token."""
    parts = zip(slot.extents, torch.split(slot.gate, [hi - lo for lo, hi in slot.extents]), strict=True)
    runs: list[tuple[Extent, list[Tensor]]] = []
    for (lo, hi), gate in sorted(parts, key=lambda part: part[0]):
        if runs and runs[-1][0][1] == lo:  # neighbours become one product
            runs[-1] = ((runs[-1][0][0], hi), [*runs[-1][1], gate])
        else:
            runs.append(((lo, hi), [gate]))
    return [Run(tokens, slice(lo, hi), torch.cat(gates).to(device), slot.modules) for (lo, hi), gates in runs]


def _short_runs(
    segments: Sequence[tuple[GateSlot | None, int]], start: int, device: torch.device | str
) -> list[Run]:
    """A dense gate over the rows that any of these requests uses; the bare base at either end is left out."""
    while segments and segments[0][0] is None:
        start += segments[0][1]
        segments = segments[1:]
    while segments and segments[-1][0] is None:
        segments = segments[:-1]
    slots = {id(slot): slot for slot, _ in segments if slot is not None}
    if not slots:
        return []
    length = sum(n for _, n in segments)
    tokens = slice(start, start + length)
    if len(slots) == 1 and all(slot is not None for slot, _ in segments):
        return _slot_runs(next(iter(slots.values())), tokens, device)
    extents = _union([extent for slot in slots.values() for extent in slot.extents])
    modules = frozenset[str]().union(*(slot.modules for slot in slots.values()))
    gates = [torch.zeros(length, hi - lo) for lo, hi in extents]
    at = 0
    for slot, n in segments:
        if slot is not None:
            _place(slot, slice(at, at + n), extents, gates)
        at += n
    return [
        Run(tokens, slice(lo, hi), gate.to(device), modules)
        for (lo, hi), gate in zip(extents, gates, strict=True)
    ]


def _place(slot: GateSlot, tokens: slice, extents: Sequence[Extent], gates: Sequence[Tensor]) -> None:
    done = 0
    for lo, hi in slot.extents:
        for (run_lo, run_hi), gate in zip(extents, gates, strict=True):
            if run_lo <= lo and hi <= run_hi:
                gate[tokens, lo - run_lo : hi - run_lo] = slot.gate[done : done + hi - lo]
        done += hi - lo


def _union(extents: Sequence[Extent]) -> list[Extent]:
    """The fewest ranges that cover the given ones and nothing else, in rising order."""
    union: list[Extent] = []
    for lo, hi in sorted(extents):
        if union and lo <= union[-1][1]:
            union[-1] = (union[-1][0], max(hi, union[-1][1]))
        else:
            union.append((lo, hi))
    return union
