"""Decode steps as CUDA graphs: one launch in place of the thousands that a step is made of."""

from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any

import torch
from torch import Tensor

from loramux.adapters.layers import AdapterLayers
from loramux.kernels.gated_lora import BARE, GateSlot, Plan, Slot
from loramux.kernels.gated_lora.slots import SlotTable
from loramux.server.engine.attention import PagedAttention
from loramux.server.engine.inputs import StepInputs

#: Rows of the arena that a captured step has room for in one slot: of more, a step runs uncaptured.
LEAST_RANK = 64


def buckets(max_running: int) -> list[int]:
    """Batch sizes 1, 2, 4, ... and the largest."""
    sizes = [1]
    while sizes[-1] * 2 < max_running:
        sizes.append(sizes[-1] * 2)
    return sizes if max_running == 1 else [*sizes, max_running]


class StepGraphs:
    """For each size of a batch two steps, with and without adapters.

    Off a CUDA device nothing is captured and a replay calls the same code over the same buffers, which is how
    it is tested there.
    """

    def __init__(
        self,
        forward: Callable[[int], Tensor],
        inputs: StepInputs,
        paged: PagedAttention,
        layers: AdapterLayers,
        vocabulary: int,
        max_running: int,
    ) -> None:
        self._forward = forward
        self._inputs = inputs
        self._paged = paged
        self._layers = layers
        self._sizes = buckets(max_running)
        self._device = layers.arena.device
        self._on_cuda = self._device.type == "cuda"
        rows = layers.arena.rows
        self._rank = min(rows, max(LEAST_RANK, 1 << (rows // 4).bit_length()))
        self._logits = torch.zeros(max_running, vocabulary, dtype=torch.float32, device=self._device)
        self._best = torch.zeros(max_running, dtype=torch.int64, device=self._device)
        self._graphs: dict[tuple[int, bool], Callable[[], None]] = {}
        self._tables: dict[int, SlotTable] = {}

    def capture(self, progress: Callable[[str], None]) -> None:
        """Capture all of them, the largest first, so that the smaller ones find room in its memory."""
        pool = torch.cuda.graph_pool_handle() if self._on_cuda else None
        before = torch.cuda.memory_reserved(self._device) if self._on_cuda else 0
        for size in reversed(self._sizes):
            table = SlotTable(size, size, self._rank, self._layers.arena.rows, self._device)
            self._tables[size] = table
            self._graphs[size, False] = self._captured(size, None, pool)
            if self._layers.form.takes_tables:
                self._graphs[size, True] = self._captured(size, table, pool)
        if self._on_cuda:
            taken = (torch.cuda.memory_reserved(self._device) - before) / 2**20
            progress(
                f"captured {len(self._graphs)} steps of up to {self._sizes[-1]} sequences: {taken:.0f} MiB"
            )

    @torch.inference_mode()
    def _captured(self, size: int, table: SlotTable | None, pool: Any) -> Callable[[], None]:
        rows = self._inputs.rows(size)
        plan = BARE if table is None else Plan(table=table)

        def step() -> None:
            self._paged.plan(rows)
            self._layers.plan = plan
            try:
                self._logits[:size].copy_(self._forward(size))
            finally:
                self._layers.plan = BARE
            torch.argmax(self._logits[:size], dim=-1, out=self._best[:size])

        if not self._on_cuda:
            return step
        self._pad(0, size)
        self._inputs.send()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # kernels are compiled and workspaces made before anything is captured
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            step()
        return graph.replay

    def replay(self, slots: Items[tuple[Slot | None, int]]) -> tuple[Tensor, Tensor] | None:
        """Run the step whose rows the inputs hold; logits float32 [rows, vocabulary] and their argmax, or
        `None` where no captured step fits."""
        count = len(slots)
        size = next((size for size in self._sizes if size >= count), None)
        if size is None:
            return None
        adapted = [(slot, length) for slot, length in slots if slot is None or isinstance(slot, GateSlot)]
        if len(adapted) < count or any(
            slot is not None and len(slot.gate) > self._rank for slot, _ in adapted
        ):
            return None
        bare = all(slot is None for slot, _ in adapted)
        graph = self._graphs.get((size, not bare))
        if graph is None:
            return None
        if not bare:
            self._tables[size].fill(adapted)
        self._pad(count, size)
        self._inputs.send()
        graph()
        return self._logits[:count], self._best[:count]

    def _pad(self, count: int, size: int) -> None:
        """Rows beyond the batch's own attend to one token on the page that belongs to nobody."""
        rows = slice(count, size)
        self._inputs.host_ids[rows] = 0
        self._inputs.host_positions[rows] = 0
        self._inputs.host_slots[rows] = self._paged.padding_slot
        self._inputs.host_lengths[rows] = 1
        self._inputs.host_tables[rows, 0] = self._paged.pages
