"""Random slots and packed batches, and the gate they amount to."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from loramux.kernels.gated_lora.gate_slot import GateSlot

Segments = list[tuple[GateSlot | None, int]]

TRAFFIC = ["distinct", "identical", "zipf", "prefill beside decodes", "mixed with the base", "bare", "empty"]


def draw(low: int, high: int) -> int:
    """A whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, ()))


def make_slots(count: int, rows: int, max_rank: int) -> list[GateSlot]:
    """Slots of mixed ranks from 1 on, over rows that are not neighbours and that some of them share."""
    slots = []
    for _ in range(count):
        rank = draw(1, max_rank)
        chosen = sorted(torch.randperm(rows)[:rank].tolist()) if draw(0, 1) else list(range(rank))
        starts = [i for i, row in enumerate(chosen) if i == 0 or chosen[i - 1] != row - 1]
        extents = [
            (chosen[start], chosen[stop - 1] + 1) for start, stop in itertools.pairwise([*starts, rank])
        ]
        order = torch.randperm(len(extents)).tolist()
        slots.append(GateSlot(tuple(extents[i] for i in order), torch.randn(rank), frozenset({"m"})))
    return slots


def traffic(kind: str, slots: Sequence[GateSlot], long: int = 40) -> Segments:
    if kind == "distinct":
        return [(slot, draw(1, 3)) for slot in slots]
    if kind == "identical":
        return [(slots[0], 1) for _ in range(20)]
    if kind == "zipf":
        weights = 1 / torch.arange(1, len(slots) + 1)
        return [(slots[i], draw(1, 4)) for i in torch.multinomial(weights, 14, replacement=True).tolist()]
    if kind == "prefill beside decodes":
        return [(slots[0], 1), (slots[1], long), (None, 1), (slots[2], 1), (slots[1], 1)]
    if kind == "mixed with the base":
        return [(None, 3), (slots[0], 2), (None, 17), (slots[1], 19), (slots[0], 1), (None, 2)]
    return [(None, 5), (None, 1)] if kind == "bare" else []


def tokens_of(segments: Segments) -> int:
    return sum(length for _, length in segments)


def gate_of(segments: Segments, rows: int) -> Tensor:
    """[tokens, rows] float64: the factor with which each token uses each row."""
    gate = torch.zeros(tokens_of(segments), rows, dtype=torch.float64)
    at = 0
    for slot, length in segments:
        if slot is not None:
            gate[at : at + length, rows_of(slot)] = slot.gate.double()
        at += length
    return gate


def rows_of(slot: GateSlot) -> list[int]:
    """The rows of a slot in the order of its gate."""
    return [row for lo, hi in slot.extents for row in range(lo, hi)]
