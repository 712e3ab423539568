"""The slot table against the segments it was filled with."""

import subprocess
import sys

import pytest
import torch

from loramux.kernels.gated_lora.gate_slot import GateSlot
from loramux.kernels.gated_lora.slots import SlotCapacityError, SlotTable, UnionTable
from tests.kernels.batches import TRAFFIC, Segments, draw, gate_of, make_slots, rows_of, tokens_of, traffic

ROWS = 97


def slot_of_rank(rank: int) -> GateSlot:
    return GateSlot(((2, 2 + rank),), torch.randn(rank), frozenset())


def check(table: SlotTable, segments: Segments) -> None:
    """The table says what the segments say, each token with a slot is in one tile, and the rest is unused."""
    tokens = tokens_of(segments)
    expected = [slot for slot, length in segments for _ in range(length)]
    assert table.tokens == tokens
    assert table.is_bare == all(slot is None for slot in expected)

    slots = table.slots.tolist()
    assert all(slot == -1 for slot in slots[tokens:])
    gate = torch.zeros(tokens, table.max_rows, dtype=torch.float64)
    for token, slot in enumerate(expected):
        index = slots[token]
        assert (index == -1) == (slot is None)
        if slot is not None:
            rank = int(table.ranks[index])
            rows = table.rows[index].tolist()
            assert rows == rows_of(slot) + [-1] * (table.max_rank - rank)
            assert (table.gates[index, rank:] == 0).all()
            gate[token, rows[:rank]] = table.gates[index, :rank].double()
    assert torch.equal(gate, gate_of(segments, table.max_rows))

    covered: list[int] = []
    for start, length, index in table.tiles.tolist():
        if index >= 0:
            assert 1 <= length <= table.tile
            work = table.order[start : start + length].tolist()
            assert all(slots[token] == index for token in work)
            covered += work
    assert sorted(covered) == [token for token in range(tokens) if slots[token] >= 0]


@pytest.mark.parametrize("long", [40, 700])
@pytest.mark.parametrize("kind", TRAFFIC)
def test_holds_what_it_was_filled_with(kind: str, long: int) -> None:
    slots = make_slots(6, ROWS, 33)
    segments = traffic(kind, slots, long)
    table = SlotTable(long + 30 + draw(0, 20), 6, 33 + draw(0, 5), ROWS)
    table.fill(segments)
    check(table, segments)


def test_a_refill_forgets_the_last_batch_and_moves_nothing() -> None:
    table = SlotTable(100, 6, 33, ROWS)
    tensors = [table.slots, table.order, table.tiles, table.ranks, table.rows, table.gates]
    addresses = [tensor.data_ptr() for tensor in tensors]
    slots = make_slots(6, ROWS, 33)
    for kind in TRAFFIC:
        segments = traffic(kind, slots)
        table.fill(segments)
        check(table, segments)
    now = [table.slots, table.order, table.tiles, table.ranks, table.rows, table.gates]
    assert [tensor.data_ptr() for tensor in now] == addresses
    assert all(address % 64 == addresses[0] % 64 for address in addresses)


@pytest.mark.parametrize("max_tokens", [1, 15, 16, 17, 90, 511, 512, 900])
def test_has_tiles_for_every_batch_it_has_tokens_and_slots_for(max_tokens: int) -> None:
    max_slots = draw(1, 40)
    table = SlotTable(max_tokens, max_slots, 4, ROWS)
    slots = make_slots(max_slots, ROWS, 4)
    # The worst case: every slot has one token more than full tiles hold.
    lengths = [1] * min(max_slots, max_tokens)
    while sum(lengths) + table.tile <= max_tokens:
        lengths[draw(0, len(lengths) - 1)] += table.tile
    segments: Segments = list(zip(slots, lengths, strict=False))
    table.fill(segments)
    check(table, segments)


def test_a_slot_without_rows_is_the_bare_base() -> None:
    table = SlotTable(8, 1, 4, ROWS)
    table.fill([(GateSlot((), torch.zeros(0), frozenset()), 3)])
    assert table.is_bare
    assert (table.slots == -1).all()
    assert (table.tiles[:, 2] == -1).all()


def test_equal_segments_are_not_copied_again() -> None:
    slots = make_slots(2, ROWS, 4)
    table = SlotTable(8, 2, 4, ROWS)
    table.fill([(slots[0], 3), (slots[1], 1)])
    table.slots.fill_(7)
    table.fill([(slots[0], 3), (slots[1], 1)])
    assert (table.slots == 7).all()
    table.fill([(slots[1], 3), (slots[0], 1)])
    check(table, [(slots[1], 3), (slots[0], 1)])


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        ([(None, 9)], "9 tokens, the slot table has room for 8"),
        ([(slot_of_rank(1), 1), (slot_of_rank(1), 1), (slot_of_rank(1), 1)], "3 slots.* room for 2"),
        ([(slot_of_rank(5), 1)], "5 rows in one slot.* room for 4"),
    ],
)
def test_a_batch_beyond_a_capacity_is_refused_and_changes_nothing(segments: Segments, words: str) -> None:
    table = SlotTable(8, 2, 4, ROWS)
    last: Segments = [(slot_of_rank(4), 2), (None, 1)]
    table.fill(last)
    with pytest.raises(SlotCapacityError, match=words):
        table.fill(segments)
    check(table, last)


def test_rows_beyond_the_factors_are_refused() -> None:
    with pytest.raises(ValueError, match="the stacked factors have 3"):
        SlotTable(8, 2, 4, 3).fill([(slot_of_rank(4), 1)])


def test_a_negative_length_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 tokens"):
        SlotTable(8, 2, 4, ROWS).fill([(None, 2), (None, -1)])


@pytest.mark.parametrize("name", ["max_tokens", "max_slots", "max_rank", "max_rows"])
def test_a_capacity_of_nothing_is_refused(name: str) -> None:
    sizes = {"max_tokens": 1, "max_slots": 1, "max_rank": 1, "max_rows": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        SlotTable(**sizes)


def test_needs_no_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
from loramux.kernels.gated_lora.slots import SlotTable
SlotTable(1, 1, 1, 1)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_a_union_table_says_what_each_token_has_of_each_row() -> None:
    table = UnionTable(12, 40, 60)
    slots = [
        GateSlot(((3, 7), (20, 22)), torch.rand(6), frozenset("m")),
        GateSlot(((20, 25),), torch.rand(5), frozenset("m")),
        GateSlot((), torch.empty(0), frozenset()),
    ]
    for segments in (
        [(slots[0], 2), (None, 1), (slots[1], 1), (slots[0], 1), (slots[2], 1)],
        [(slots[1], 3)],
        [(None, 4)],
    ):
        table.fill(segments)
        tokens = [slot for slot, length in segments for _ in range(length)]
        dense = torch.zeros(12, 60)
        for token, slot in enumerate(tokens):
            done = 0
            for lo, hi in slot.extents if slot else ():
                dense[token, lo:hi] = slot.gate[done : done + hi - lo]
                done += hi - lo
        rank = int(table.ranks[0])
        assert torch.equal(table.factors[:, :rank], dense[:, table.rows[0, :rank].long()])
        assert not table.factors[:, rank:].any()
        assert dense.any(0).sum() == rank
        with_slot = [token for token, slot in enumerate(tokens) if slot is not None and slot.extents]
        count = sum(int(tile[1]) for tile in table.tiles if tile[2] == 0)
        assert table.order[:count].tolist() == with_slot
        assert table.is_bare == (not with_slot)
    before = table.factors.clone()
    with pytest.raises(SlotCapacityError, match="13 tokens"):
        table.fill([(slots[0], 13)])
    with pytest.raises(SlotCapacityError, match="50 rows"):
        table.fill([(GateSlot(((0, 50),), torch.ones(50), frozenset()), 1)])
    with pytest.raises(ValueError, match="60"):
        table.fill([(GateSlot(((59, 61),), torch.ones(2), frozenset()), 1)])
    assert torch.equal(table.factors, before)
