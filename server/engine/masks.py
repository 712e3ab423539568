"""Which tokens each row of a step may have, put over its logits."""

import time
from collections.abc import Sequence as Items
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from llguidance import LLExecutor
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray
from torch import Tensor

from loramux.kernels.pointwise import forbid_, takes
from loramux.server.engine.grammars import Grammars
from loramux.server.engine.scheduler import Chunk
from loramux.server.engine.sequence import Sequence

#: Seconds that masks take one after the other at most, before all cores are woken for the next ones.
_LONG = 5e-3


class Masks:
    """Used by the stepping thread alone. Beside a GPU another thread works between its calls of `begin` and
    `apply_`; on a CPU the step itself needs every core, and waking others takes longer than most masks.

    What it works with is made when the first sequence with a grammar comes.
    """

    def __init__(self, grammars: Grammars | None, max_running: int, device: torch.device) -> None:
        self._grammars = grammars
        self._max_running = max_running
        self._device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._pending: Future[None] | None = None
        self._constrained: Items[Sequence] = ()
        self._seconds = 0.0
        self._width = 0
        self._bits: NDArray[np.int32] = np.zeros((0, 0), dtype=np.int32)

    def begin(self, chunks: Items[Chunk]) -> None:
        """Start on the masks of those sequences whose next token a step chooses and a grammar limits."""
        constrained = [chunk.sequence for chunk in chunks if chunk.samples and chunk.sequence.is_constrained]
        if constrained:
            self.wait()
            if not self._width:
                self._prepare()
            self._constrained = constrained
            if self._device.type != "cpu":
                self._pending = self._thread.submit(self._fill)

    def apply_(self, logits: Tensor, rows: Items[int]) -> None:
        """Put minus infinity where the masks that were begun forbid it; `rows` of logits
        [rows, vocabulary] are those sequences, in their order. Tokens beyond the masks are forbidden."""
        if self._pending is None:
            self._fill()
        else:
            self._pending.result()
        masks = self._staged[: len(rows)]
        at = torch.tensor(rows)
        if takes(logits) and logits.is_contiguous():
            forbid_(logits, masks, at)
            return
        packed = self._packed[: len(rows)]
        packed.copy_(masks, non_blocking=True)
        width = min(self._width, logits.shape[-1])
        at = at.to(logits.device)
        chosen = logits[at]
        chosen[:, :width].masked_fill_(unpacked(packed)[:, :width], -torch.inf)
        chosen[:, width:] = -torch.inf
        logits[at] = chosen

    def wait(self) -> None:
        """Until what was begun has ended, also where its step failed: till then its matchers are in use."""
        if self._pending is not None:
            self._pending.exception()
            self._pending = None

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _prepare(self) -> None:
        assert self._grammars is not None  # where the matchers come from
        self._width = self._grammars.width
        shape = self._max_running, -(-self._width // 32)
        on_cuda = self._device.type == "cuda"
        self._staged = torch.zeros(shape, dtype=torch.int32, pin_memory=on_cuda)
        self._bits = self._staged.numpy()
        self._packed = self._staged.to(self._device)
        self._executor = LLExecutor()

    def _fill(self) -> None:
        """The masks into the staged bits; with all cores where the last ones took long."""
        started = time.perf_counter()
        matchers = [one.matcher for one in self._constrained if one.matcher is not None]
        if self._device.type != "cpu" or self._seconds > _LONG:
            pairs = [(matcher, row) for row, matcher in enumerate(matchers)]
            fill_next_token_bitmask_par(self._executor, pairs, self._bits)
        else:
            for row, matcher in enumerate(matchers):
                fill_next_token_bitmask(matcher, self._bits, row)
        self._seconds = time.perf_counter() - started


def unpacked(packed: Tensor) -> Tensor:
    """True where a bit of int32 [rows, words] is 0: bool [rows, words * 32]."""
    bits = torch.arange(32, dtype=torch.int32, device=packed.device)
    return ((packed.unsqueeze(-1) >> bits) & 1 == 0).flatten(1)
