"""Runs a step: the model over the step's tokens, with the adapters of each sequence."""

import inspect
import logging
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from loramux.adapters.layers import AdapterLayers
from loramux.kernels.gated_lora import BARE, Plan, Slot, plan_step
from loramux.kernels.paged_attention import Rows
from loramux.server.engine.attention import PAGED, PagedAttention, Piece
from loramux.server.engine.graphs import StepGraphs
from loramux.server.engine.inputs import StepInputs
from loramux.server.engine.sampler import CapturedDraw
from loramux.server.engine.scheduler import Chunk
from loramux.server.engine.stack import DecodeStack, UnfitError

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, slots=True)
class Logits:
    """What a step gave.

    Attributes:
        values: float32 [rows, vocabulary].
        best: int64 [rows], their argmax, where the step has it; captured: draws from them, where it can.
        rows: which of them belong to each chunk; empty for a piece that ends before its prompt does.
    """

    values: Tensor
    best: Tensor | None
    rows: tuple[slice, ...]
    captured: CapturedDraw | None = None


class Runner:
    """A model with its cache.

    A model is used through public arguments only: ids and positions, and an attention function that its
    config names. Used by the stepping thread alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: AdapterLayers,
        *,
        pages: int,
        page_size: int,
        max_tokens: int,
        max_running: int,
        max_context: int,
        graphs: bool,
        invariant: bool = False,
    ) -> None:
        """`invariant`: a token of a prompt is computed as one of an answer is, and gets the same to the last
        bit where the base's products give each row the same (`StoredLinear`)."""
        self._model = model
        self._layers = layers
        self._paged = PagedAttention(pages, page_size, model.dtype, model.device)
        rows = max_tokens if invariant else max_running
        self._inputs = StepInputs(max_tokens, rows, -(-max_context // page_size), model.device)
        self._invariant = invariant
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._before = model.config._attn_implementation
        self._plan_slots: list[tuple[Slot | None, int]] = []
        self._plan = BARE
        self._stack: DecodeStack | None = None
        self._graphs: StepGraphs | None = None
        if graphs:
            self._graphs = StepGraphs(
                self._forward, self._inputs, self._paged, layers, logits_width(model), max_running
            )

    def start(self) -> None:
        """Take the model, capture its decode steps where that was asked for, and on a CPU find out whether
        its layers can be run in one call."""
        self._model.set_attn_implementation(PAGED)
        self._paged.attach(self._model)
        self._stack = self._find_stack()
        if self._graphs is not None:
            self._graphs.capture()

    def stop(self) -> None:
        """Give the model back as it was."""
        self._paged.detach(self._model)
        self._model.set_attn_implementation(self._before)

    @property
    def layers_seen(self) -> int:
        """Layers that have attended through the paged cache."""
        return self._paged.layers

    @torch.inference_mode()
    def run(self, chunks: Items[Chunk], meanwhile: Callable[[], None]) -> Logits:
        """The logits of a step; those of every position for a chunk whose prompt is to be scored.

        `meanwhile` is called once: while the device computes a captured step, which was launched in no time,
        and before any other, which is launched bit by bit or computed right here.
        """
        slots = [(chunk.sequence.slot, chunk.length) for chunk in chunks]
        count = self._write(chunks)
        singles = all(chunk.length == 1 for chunk in chunks)
        if singles and self._graphs is not None:
            replayed = self._graphs.replay(slots)
            if replayed is not None:
                meanwhile()
                rows = tuple(slice(row, row + 1) for row in range(count))
                return Logits(*replayed, rows, self._graphs.draw)
        meanwhile()
        self._inputs.send()
        ranges: list[slice] = []
        keep: list[int] = []
        done = 0
        for chunk in chunks:
            wanted = chunk.length if chunk.sequence.needs_prompt_scores else int(chunk.samples)
            ranges.append(slice(len(keep), len(keep) + wanted))
            keep += range(done + chunk.length - wanted, done + chunk.length)
            done += chunk.length
        kept = None if len(keep) == count else keep
        plan = self._plan_for(slots)
        if singles and self._stack is not None and self._stack.fits(plan, count):
            hidden = self._stack.hidden(self._inputs, self._inputs.rows(count))
            logits = self._stack.logits(hidden if kept is None else hidden[kept])
            return Logits(logits, None, tuple(ranges))
        self._paged.plan(*self._attention(chunks, count))
        self._layers.plan = plan
        try:
            logits = self._forward(count, kept)
        finally:
            self._layers.plan = BARE
        return Logits(logits.float(), None, tuple(ranges))

    @torch.inference_mode()
    def _find_stack(self) -> DecodeStack | None:
        """The layers in one call, if a sequence of two tokens gets the model's own logits from them. It is
        written to the first pages, which hold nothing yet."""
        if self._model.device.type != "cpu" or self._paged.pages < 2:
            return None
        try:
            stack = DecodeStack(self._model, self._layers, self._paged)
        except UnfitError as reason:
            log.debug("decode steps are called layer by layer: %s", reason)
            return None
        inputs = self._inputs
        pages = min(2, inputs.host_tables.shape[1])
        inputs.host_tables[0, :pages] = range(pages)
        for place in range(min(2, pages * self._paged.page_size)):
            inputs.host_ids[0] = place
            inputs.host_positions[0] = inputs.host_slots[0] = place
            inputs.host_lengths[0] = place + 1
            self._paged.plan(inputs.rows(1))
            expected = self._forward(1)
        return stack if stack.agrees(inputs, inputs.rows(1), expected) else None

    def _forward(self, tokens: int, keep: Items[int] | None = None) -> Tensor:
        """The model over the first tokens of the inputs; logits [rows, vocabulary] of those in `keep`, or of
        all."""
        kept = None if keep is None else torch.tensor(keep, dtype=torch.int64, device=self._model.device)
        options: dict[str, Any] = {"logits_to_keep": kept} if kept is not None and self._keeps else {}
        logits: Tensor = self._model(
            input_ids=self._inputs.ids[:, :tokens],
            position_ids=self._inputs.positions[:, :tokens],
            use_cache=False,
            **options,
        ).logits[0]
        return logits if kept is None or self._keeps else logits[kept]

    def _write(self, chunks: Items[Chunk]) -> int:
        """Ids, positions, slots and, of rows, pages; returns the number of tokens."""
        inputs, size = self._inputs, self._paged.page_size
        done = 0
        for number, chunk in enumerate(chunks):
            sequence, start = chunk.sequence, chunk.start
            row = done if self._invariant else number
            if chunk.length == 1:
                inputs.host_ids[done] = sequence.tokens[start]
                inputs.host_positions[done] = start
                inputs.host_slots[done] = sequence.pages[start // size] * size + start % size
                inputs.host_lengths[row] = start + 1
                inputs.host_tables[row, : len(sequence.pages)] = sequence.pages
            else:
                end = start + chunk.length
                at = slice(done, done + chunk.length)
                positions = np.arange(start, end)
                inputs.host_ids[at] = sequence.tokens[start:end]
                inputs.host_positions[at] = positions
                inputs.host_slots[at] = (
                    np.asarray(sequence.pages)[positions // size] * size + positions % size
                )
                if self._invariant:
                    inputs.host_lengths[at] = positions + 1
                    inputs.host_tables[at, : len(sequence.pages)] = sequence.pages
            done += chunk.length
        return done

    def _attention(self, chunks: Items[Chunk], count: int) -> tuple[Rows | None, Tensor | None, list[Piece]]:
        """What the attention is told about a step: rows of single tokens come first, which the scheduler sees
        to. Where all tokens are to be computed alike, all are rows."""
        if self._invariant:
            return self._inputs.rows(count), None, []
        singles = 0
        while singles < len(chunks) and chunks[singles].length == 1:
            singles += 1
        pieces: list[Piece] = []
        done = singles
        for chunk in chunks[singles:]:
            at = slice(done, done + chunk.length)
            pieces.append(Piece(at, chunk.start, chunk.sequence.pages))
            done = at.stop
        rows = self._inputs.rows(singles) if singles else None
        return rows, self._inputs.slots[singles:count] if pieces else None, pieces

    def _plan_for(self, slots: list[tuple[Slot | None, int]]) -> Plan:
        """The plan of this step; a decode step over the same sequences as the last one reuses its plan."""
        if slots != self._plan_slots:  # slots compare by identity
            self._plan, self._plan_slots = plan_step(slots), slots
        return self._plan


def logits_width(model: PreTrainedModel) -> int:
    """Numbers in a row of logits."""
    head = model.get_output_embeddings()
    return int(getattr(head, "out_features", None) or model.config.get_text_config().vocab_size)
