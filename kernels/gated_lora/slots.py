"""What a step's tokens need to find their rows, in tensors that never move: a captured CUDA graph reads them
again at every replay, so a new batch is one copy into the same memory."""

from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loramux.kernels.gated_lora.gate_slot import GateSlot

#: Tokens of one slot that are multiplied together. Few where a batch is decode steps of many blends, more
#: where it may be prefill: a longer tile reads the factors less often.
SHORT_TILE, LONG_TILE = 16, 64
LONG_TILE_FROM = 512

#: Sections start on 64 bytes, which lets the kernels load them in wide pieces.
_ALIGN = 16

_Array = TypeVar("_Array", Tensor, NDArray[np.int32])


class SlotCapacityError(ValueError):
    """A batch holds more than the table was made for."""


class _Sections(NamedTuple, Generic[_Array]):
    slots: _Array
    order: _Array
    tiles: _Array
    ranks: _Array
    rows: _Array
    gates: _Array


class SlotTable:
    """The slots of one packed batch, for the Triton form of the operator.

    All tensors are views of one buffer on `device`, allocated once:

    - `slots` int32 [max_tokens]: the slot of each token, -1 for the bare base and for padding;
    - `order` int32 [max_tokens]: the tokens that have a slot, those of one slot next to each other;
    - `tiles` int32 [max_tiles, 3]: (start in `order`, number of tokens, slot) of each piece of work; the slot
      of an unused tile is -1;
    - `ranks` int32 [max_slots]: the number of rows of each slot;
    - `rows` int32 [max_slots, max_rank]: which rows of the stacked factors these are, then -1;
    - `gates` float32 [max_slots, max_rank]: the factor of each row, then 0.

    Args:
        max_tokens: tokens of the largest batch, padding included.
        max_slots: different slots in one batch.
        max_rank: rows of one slot, over all its extents.
        max_rows: rows of the stacked factors; a slot that points beyond them is refused.
        device: where the kernels run.

    Raises:
        ValueError: a capacity is below 1.
    """

    def __init__(
        self,
        max_tokens: int,
        max_slots: int,
        max_rank: int,
        max_rows: int,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in {
            "max_tokens": max_tokens,
            "max_slots": max_slots,
            "max_rank": max_rank,
            "max_rows": max_rows,
        }.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.max_tokens = max_tokens
        self.max_slots = max_slots
        self.max_rank = max_rank
        self.max_rows = max_rows
        self.device = torch.device(device)
        self.tile = SHORT_TILE if max_tokens < LONG_TILE_FROM else LONG_TILE
        # Each slot may leave one tile unfilled, and no tile is empty.
        self.max_tiles = min(max_tokens, (max_tokens + max_slots * (self.tile - 1)) // self.tile)
        #: Tokens of the last fill, padding not included, and whether none of them has a slot.
        self.tokens = 0
        self.is_bare = True

        shapes = [max_tokens, max_tokens, 3 * self.max_tiles, max_slots, *[max_slots * max_rank] * 2]
        offsets = [0]
        for size in shapes:
            offsets.append(-(-(offsets[-1] + size) // _ALIGN) * _ALIGN)
        cuts = [slice(at, at + size) for at, size in zip(offsets, shapes, strict=False)]
        on_cuda = self.device.type == "cuda"
        self._staging = torch.zeros(offsets[-1], dtype=torch.int32, pin_memory=on_cuda)
        self._buffer = torch.zeros(offsets[-1], dtype=torch.int32, device=self.device)
        host: NDArray[np.int32] = self._staging.numpy()
        self._host = _Sections(*(host[cut] for cut in cuts))
        device_sections = _Sections(*(self._buffer[cut] for cut in cuts))
        self.slots = device_sections.slots
        self.order = device_sections.order
        self.tiles = device_sections.tiles.view(self.max_tiles, 3)
        self.ranks = device_sections.ranks
        self.rows = device_sections.rows.view(max_slots, max_rank)
        self.gates = device_sections.gates.view(torch.float32).view(max_slots, max_rank)
        self._copied = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]
        self._segments: tuple[tuple[GateSlot | None, int], ...] | None = None
        self.fill(())

    def fill(self, segments: Sequence[tuple[GateSlot | None, int]]) -> None:
        """Describe the next batch: (slot, number of tokens) of each request, in the order of its tokens.

        `None` is the bare base, and so is a slot without rows. One copy to the device, on the current stream;
        none when the segments are those of the last call. Must not be called while a graph is captured.

        Raises:
            SlotCapacityError: the batch has more tokens or slots than the table, or a slot more rows; the
                table still describes the last batch then.
            ValueError: a length is negative, or a slot points beyond the stacked factors.
        """
        segments = tuple(segments)
        if segments == self._segments:  # slots compare by identity
            return
        spans: dict[GateSlot, list[tuple[int, int]]] = {}
        tokens = 0
        for slot, length in segments:
            if length < 0:
                raise ValueError(f"a segment has {length} tokens")
            if slot is not None and length and slot.extents:
                spans.setdefault(slot, []).append((tokens, tokens + length))
            tokens += length
        self._check({"tokens": (tokens, self.max_tokens)} | self._needs(list(spans)))
        for slot in spans:
            if any(lo < 0 or hi > self.max_rows for lo, hi in slot.extents):
                raise ValueError(
                    f"a slot has the rows {slot.extents}, the stacked factors have {self.max_rows}"
                )
        if self._copied is not None:
            self._copied.synchronize()  # the last copy may still be reading what is staged
        self._write(spans)
        self._send()
        if self._copied is not None:
            self._copied.record()
        self._segments = segments  # also keeps the slots alive, so that equal ids mean equal slots
        self.tokens = tokens
        self.is_bare = not spans

    @staticmethod
    def _check(needs: Mapping[str, tuple[int, int]]) -> None:
        for what, (needed, room) in needs.items():
            if needed > room:
                raise SlotCapacityError(f"the batch has {needed} {what}, the slot table has room for {room}")

    def _needs(self, slots: Sequence[GateSlot]) -> dict[str, tuple[int, int]]:
        """What slots need, and how much of it there is."""
        return {
            "slots": (len(slots), self.max_slots),
            "rows in one slot": (max((len(slot.gate) for slot in slots), default=0), self.max_rank),
        }

    def _write(self, spans: Mapping[GateSlot, Sequence[tuple[int, int]]]) -> None:
        """Stage the slots, and the token ranges of each."""
        self._write_slots(list(spans))
        self._write_tokens(list(spans.values()))

    def _send(self) -> None:
        """Copy what is staged, on the current stream."""
        self._buffer.copy_(self._staging, non_blocking=True)

    def _write_slots(self, slots: Sequence[GateSlot]) -> None:
        shape = (self.max_slots, self.max_rank)
        ranks, rows = self._host.ranks, self._host.rows.reshape(shape)
        gates = self._host.gates.view(np.float32).reshape(shape)
        ranks[len(slots) :] = 0
        rows.fill(-1)
        gates.fill(0)
        for index, slot in enumerate(slots):
            done = 0
            for lo, hi in slot.extents:
                rows[index, done : done + hi - lo] = np.arange(lo, hi)
                done += hi - lo
            ranks[index] = done
            gates[index, :done] = slot.gate.detach().cpu().numpy()

    def _write_tokens(self, spans: Sequence[Sequence[tuple[int, int]]]) -> None:
        host = self._host
        host.slots.fill(-1)
        tiles: list[tuple[int, int, int]] = []
        done = 0
        for index, ranges in enumerate(spans):
            first = done
            for start, stop in ranges:
                host.slots[start:stop] = index
                host.order[done : done + stop - start] = np.arange(start, stop)
                done += stop - start
            tiles += [(at, min(self.tile, done - at), index) for at in range(first, done, self.tile)]
        table = host.tiles.reshape(self.max_tiles, 3)
        table[:] = (0, 0, -1)
        if tiles:
            table[: len(tiles)] = tiles


class UnionTable(SlotTable):
    """The slots of a decode step as one: all rows that any of them uses, with a factor for each token and
    row.

    Blends share experts, and a product takes sixteen tokens as fast as one: every row is read once a step,
    and what a token has no part in is multiplied by 0.

    - `factors` float32 [max_tokens, max_rank]: of each token, for the rows that `rows[0]` names.
    """

    def __init__(
        self, max_tokens: int, max_rank: int, max_rows: int, device: torch.device | str = "cpu"
    ) -> None:
        pinned = torch.device(device).type == "cuda"
        self._staged = torch.zeros(max_tokens, max_rank, dtype=torch.float32, pin_memory=pinned)
        self.factors = torch.zeros(max_tokens, max_rank, dtype=torch.float32, device=device)
        super().__init__(max_tokens, 1, max_rank, max_rows, device)

    def _needs(self, slots: Sequence[GateSlot]) -> dict[str, tuple[int, int]]:
        return {"rows": (len(union_rows(slots)), self.max_rank)}

    def _write(self, spans: Mapping[GateSlot, Sequence[tuple[int, int]]]) -> None:
        rows = union_rows(list(spans))
        places = {row: place for place, row in enumerate(rows)}
        host, factors = self._host, self._staged.numpy()
        host.ranks[0] = len(rows)
        host.rows.fill(-1)
        host.rows[: len(rows)] = rows
        host.gates.view(np.float32).fill(0)
        host.gates.view(np.float32)[: len(rows)] = 1
        factors.fill(0)
        for slot, ranges in spans.items():
            at = [places[row] for lo, hi in slot.extents for row in range(lo, hi)]
            for start, stop in ranges:
                factors[start:stop, at] = slot.gate.detach().cpu().numpy()
        together = sorted(span for ranges in spans.values() for span in ranges)
        self._write_tokens([together] if together else [])

    def _send(self) -> None:
        super()._send()
        self.factors.copy_(self._staged, non_blocking=True)


def union_rows(slots: Sequence[GateSlot]) -> list[int]:
    """All rows that any slot uses, in rising order."""
    return sorted({row for slot in slots for lo, hi in slot.extents for row in range(lo, hi)})
