"""Decode steps as CUDA graphs: one launch in place of the thousands that a step is made of."""

import logging
from collections.abc import Callable
from collections.abc import Sequence as Items
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loramux.adapters.layers import AdapterLayers
from loramux.kernels.gated_lora import BARE, GateSlot, Plan, Slot, TokenSlot, plan_step
from loramux.kernels.gated_lora.slots import SlotCapacityError, UnionTable
from loramux.server.engine.attention import PagedAttention
from loramux.server.engine.inputs import StepInputs
from loramux.server.engine.sampler import TRIES, draw_captured

log = logging.getLogger("loramux")

#: Rows of the arena that the blends of a captured step may use together; of more, a step runs uncaptured.
MOST_ROWS = 1024

Step = Callable[[], None]


def buckets(max_running: int) -> list[int]:
    """Batch sizes 1, 2, 4, ... and the largest."""
    sizes = [1]
    while sizes[-1] * 2 < max_running:
        sizes.append(sizes[-1] * 2)
    return sizes if max_running == 1 else [*sizes, max_running]


class StepGraphs:
    """For each size of a batch two steps, with and without adapters; and for batches of one sparse model
    steps of exactly their size, captured when one comes for the second time.

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
        self._rank = min(layers.arena.rows, MOST_ROWS)
        self._logits = torch.zeros(max_running, vocabulary, dtype=torch.float32, device=self._device)
        self._best = torch.zeros(max_running, dtype=torch.int64, device=self._device)
        self._pool = torch.cuda.graph_pool_handle() if self._on_cuda else None
        self._steps: dict[tuple[int, bool], Step] = {}
        self._draws: dict[int, Step] = {}
        self._tokens = torch.zeros(max_running, dtype=torch.int64, device=self._device)
        staged = (torch.ones(max_running, 3), torch.zeros(max_running, TRIES, dtype=torch.float64))
        self._staged = tuple(part.pin_memory() for part in staged) if self._on_cuda else staged
        self._parameters, self._uniform = (part.to(self._device) for part in self._staged)
        self._tables: dict[int, UnionTable] = {}
        self._sparse: WeakKeyDictionary[TokenSlot, dict[int, Step | None]] = WeakKeyDictionary()

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture all sizes, the largest first, so that the smaller ones find room in its memory."""
        self._pad(0, 1)
        self._inputs.send()
        self._step(1, BARE)()  # makes the cache, which is not what is counted here
        before = torch.cuda.memory_reserved(self._device) if self._on_cuda else 0
        for size in reversed(self._sizes):
            self._pad(0, size)
            self._inputs.send()
            self._steps[size, False] = self._captured(self._step(size, BARE))
            self._draws[size] = self._captured(self._draw(size))
            if self._layers.form.takes_tables:
                table = UnionTable(size, self._rank, self._layers.arena.rows, self._device)
                self._tables[size] = table
                self._steps[size, True] = self._captured(self._step(size, Plan(table=table)))
        if self._on_cuda:
            taken = (torch.cuda.memory_reserved(self._device) - before) / 2**20
            log.info(
                "captured %d steps of up to %d sequences: %.0f MiB", len(self._steps), self._sizes[-1], taken
            )

    def replay(self, slots: Items[tuple[Slot | None, int]]) -> tuple[Tensor, Tensor] | None:
        """Run the step whose rows the inputs hold; logits float32 [rows, vocabulary] and their argmax, or
        `None` where no captured step fits."""
        count = len(slots)
        step = self._step_of_one_model(slots) or self._step_of_rows(slots)
        if step is None:
            return None
        self._inputs.send()
        step()
        return self._logits[:count], self._best[:count]

    def _step_of_rows(self, slots: Items[tuple[Slot | None, int]]) -> Step | None:
        count = len(slots)
        size = next((size for size in self._sizes if size >= count), 0)
        rows = [(slot, length) for slot, length in slots if slot is None or isinstance(slot, GateSlot)]
        if len(rows) < count:
            return None
        adapted = any(slot is not None for slot, _ in rows)
        step = self._steps.get((size, adapted))
        if step is not None:
            if adapted:
                try:
                    self._tables[size].fill(rows)
                except SlotCapacityError:
                    return None
            self._pad(count, size)
        return step

    def _step_of_one_model(self, slots: Items[tuple[Slot | None, int]]) -> Step | None:
        """Without padding: what a sparse model's routers decide is counted."""
        slot, count = slots[0][0], len(slots)
        if slot is None or isinstance(slot, GateSlot) or any(other is not slot for other, _ in slots):
            return None
        steps = self._sparse.setdefault(slot, {})
        if count not in steps:  # this once it runs uncaptured, which compiles its kernels
            steps[count] = None
            return None
        step = steps[count]
        if step is None:
            step = steps[count] = self._captured(self._step(count, plan_step(slots)), warm=True)
        return step

    @torch.inference_mode()
    def _captured(self, step: Step, *, warm: bool = False) -> Step:
        """The captured step of so many rows under a plan. Unless everything is `warm`, it is run before:
        kernels are compiled and workspaces made before anything is captured."""
        if not self._on_cuda:
            return step
        if not warm:
            step()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step()
        return graph.replay

    @torch.inference_mode()
    def draw(self, parameters: NDArray[np.float32], uniform: NDArray[np.float64]) -> Tensor:
        """Tokens of the last replay's rows, as `sampler.draw_captured` has them."""
        count = len(parameters)
        size = next(size for size in self._sizes if size >= count)
        for staged, given, held in zip(
            self._staged, (parameters, uniform), (self._parameters, self._uniform), strict=True
        ):
            staged.numpy()[:count] = given
            held.copy_(staged, non_blocking=True)
        self._draws[size]()
        return self._tokens[:count]

    def _draw(self, size: int) -> Step:
        def step() -> None:
            rows = slice(0, size)
            tokens = draw_captured(
                self._logits[rows], self._best[rows], self._parameters[rows], self._uniform[rows]
            )
            self._tokens[rows].copy_(tokens)

        return step

    def _step(self, size: int, plan: Plan) -> Step:
        rows = self._inputs.rows(size)

        def step() -> None:
            self._paged.plan(rows)
            self._layers.plan = plan
            try:
                self._logits[:size].copy_(self._forward(size))
            finally:
                self._layers.plan = BARE
            torch.argmax(self._logits[:size], dim=-1, out=self._best[:size])

        return step

    def _pad(self, count: int, size: int) -> None:
        """Rows beyond the batch's own attend to one token on the page that belongs to nobody."""
        rows = slice(count, size)
        self._inputs.host_ids[rows] = 0
        self._inputs.host_positions[rows] = 0
        self._inputs.host_slots[rows] = self._paged.padding_slot
        self._inputs.host_lengths[rows] = 1
        self._inputs.host_tables[rows, 0] = self._paged.pages
