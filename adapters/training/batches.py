"""Batches of encoded rows: padded little, mixed well, and the same for a given seed and step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from loramux.adapters.training.chat import EncodedRow
from loramux.adapters.training.errors import OptionError

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass.

    ids: (rows, tokens) int64, padded on the right; under causal attention padding needs no mask.
    targets: (rows, tokens) int64, the token that follows each position, or `IGNORED`.
    count: how many targets are not ignored.
    real: (rows, tokens) bool, false where a row is padded.
    """

    ids: Tensor
    targets: Tensor
    count: int
    real: Tensor


def collate(rows: Sequence[EncodedRow], pad_id: int, answers_only: bool) -> Batch:
    """Pad rows into one batch whose targets are all following tokens, or those of the answers only."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    targets = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens = torch.tensor(row.ids, dtype=torch.int64)
        ids[index, : len(row)] = tokens
        first = max(row.answer_start, 1) if answers_only else 1
        targets[index, first - 1 : len(row) - 1] = tokens[first:]
    lengths = torch.tensor([len(row) for row in rows])
    real = torch.arange(width) < lengths[:, None]
    return Batch(ids=ids, targets=targets, count=int((targets != IGNORED).sum()), real=real)


def by_length(rows: Sequence[EncodedRow], batch_tokens: int) -> list[list[EncodedRow]]:
    """Rows sorted by length and cut so that no batch holds more than `batch_tokens` with its padding."""
    batches: list[list[EncodedRow]] = []
    current: list[EncodedRow] = []
    for row in sorted(rows, key=len):
        if current and len(row) * (len(current) + 1) > batch_tokens:
            batches.append(current)
            current = []
        current.append(row)
    if current:
        batches.append(current)
    return batches


@dataclass(frozen=True, slots=True)
class Source:
    """Rows that belong together, and their share of the tokens trained on."""

    rows: Sequence[EncodedRow]
    weight: float


def tempered_sources(groups: Sequence[Sequence[EncodedRow]], temperature: float) -> list[Source]:
    """One source per group with weight `tokens ** temperature`: 1 keeps proportions, 0 makes groups equal."""
    return [
        Source(rows=rows, weight=float(sum(map(len, rows))) ** temperature)
        for rows in groups
        if len(rows) > 0
    ]


class Batches:
    """The batches of every training step, any step at once, so that a resumed run needs only its step number.

    Rows are drawn from each source in a fresh permutation per epoch. A window of several steps is drawn
    together, sorted by length, cut into forward batches and dealt at random to its steps, so that a step
    sees short and long rows yet little padding.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        pad_id: int,
        step_tokens: int,
        batch_tokens: int,
        answers_only: bool,
        seed: int,
        window_steps: int = 8,
        skip: int = 0,
    ) -> None:
        """Prepare the draw; `step_tokens` is the mean number of tokens a step trains on.

        `skip` steps at the head are left out: a later phase goes on where an earlier one stopped.

        Raises:
            OptionError: there is no source, or one without rows.
        """
        if not sources or not all(source.rows for source in sources):
            raise OptionError("no rows to train on")
        self._sources = sources
        self._pad_id = pad_id
        self._batch_tokens = batch_tokens
        self._answers_only = answers_only
        self._seed = seed
        self._window_steps = window_steps
        self._skip = skip
        total = sum(source.weight for source in sources)
        self._rows_per_window = [
            window_steps
            * step_tokens
            * (source.weight / total)
            / (sum(map(len, source.rows)) / len(source.rows))
            for source in sources
        ]
        self.rows_per_step = sum(self._rows_per_window) / window_steps
        self._permutation = lru_cache(maxsize=2 * len(sources))(self._draw_permutation)
        self._steps_of_window = lru_cache(maxsize=1)(self._draw_window)

    def _draw_permutation(self, source: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        rng = np.random.default_rng((self._seed, 1, source, epoch))
        return rng.permutation(len(self._sources[source].rows))

    def _draw_window(self, window: int) -> list[list[list[EncodedRow]]]:
        drawn: list[EncodedRow] = []
        for index, share in enumerate(self._rows_per_window):
            rows = self._sources[index].rows
            for position in range(math.ceil(window * share), math.ceil((window + 1) * share)):
                epoch, offset = divmod(position, len(rows))
                drawn.append(rows[int(self._permutation(index, epoch)[offset])])
        parts = by_length(drawn, self._batch_tokens)
        while 0 < len(parts) < self._window_steps and max(map(len, parts)) > 1:
            longest = max(parts, key=len)
            parts.remove(longest)
            parts += [longest[0::2], longest[1::2]]
        order = np.random.default_rng((self._seed, 2, window)).permutation(len(parts))
        return [
            [parts[int(part)] for part in order[step :: self._window_steps]]
            for step in range(self._window_steps)
        ]

    def step(self, step: int) -> list[Batch]:
        """The forward batches of a step; their losses are summed and divided by their total count."""
        window, offset = divmod(self._skip + step, self._window_steps)
        return [
            collate(rows, self._pad_id, self._answers_only) for rows in self._steps_of_window(window)[offset]
        ]
