"""Which tokens each row of a step may have: found beside the forward pass, put over its logits after it."""

from collections.abc import Sequence as Items
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from llguidance import LLExecutor
from llguidance.numpy import fill_next_token_bitmask_par
from numpy.typing import NDArray
from torch import Tensor

from loramux.server.engine.grammars import Grammars
from loramux.server.engine.scheduler import Chunk
from loramux.server.engine.sequence import Sequence

_Mask = NDArray[np.bool_]


class Masks:
    """Used by the stepping thread alone, between whose calls of `begin` and `apply_` another thread works.

    What it works with is made when the first sequence with a grammar comes.
    """

    def __init__(self, grammars: Grammars | None, max_running: int, device: torch.device) -> None:
        self._grammars = grammars
        self._max_running = max_running
        self._device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._pending: Future[_Mask | None] | None = None
        self._width = 0
        self._bits: NDArray[np.int32] = np.zeros((0, 0), dtype=np.int32)

    def begin(self, chunks: Items[Chunk]) -> None:
        """Start on the masks of those sequences whose next token a step chooses and a grammar limits."""
        constrained = [chunk.sequence for chunk in chunks if chunk.samples and chunk.sequence.is_constrained]
        if constrained:
            self.wait()
            if not self._width:
                self._prepare()
            self._pending = self._thread.submit(self._fill, constrained)

    def apply_(self, logits: Tensor, rows: Items[int]) -> None:
        """Put minus infinity where the masks that were begun forbid it; `rows` of logits
        [rows, vocabulary] are those sequences, in their order. Tokens beyond the masks are forbidden."""
        assert self._pending is not None  # there are such rows only where it was begun
        forbidden = self._pending.result()
        if forbidden is None:
            packed = self._packed[: len(rows)]
            packed.copy_(self._staged[: len(rows)], non_blocking=True)
            over = unpacked(packed)
        else:
            over = torch.from_numpy(forbidden)
        width = min(self._width, logits.shape[-1])
        every = len(rows) == len(logits)
        at = torch.tensor(rows, device=logits.device)
        chosen = logits if every else logits[at]
        chosen[:, :width].masked_fill_(over[:, :width], -torch.inf)
        chosen[:, width:] = -torch.inf
        if not every:
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

    def _fill(self, sequences: Items[Sequence]) -> _Mask | None:
        """The masks into the staged bits; for a CPU they are unpacked right here, True where forbidden."""
        matchers = [(one.matcher, row) for row, one in enumerate(sequences) if one.matcher is not None]
        fill_next_token_bitmask_par(self._executor, matchers, self._bits)
        if self._device.type != "cpu":
            return None
        packed = self._bits[: len(matchers)].view(np.uint8)
        allowed = np.unpackbits(packed, axis=1, bitorder="little")
        return np.equal(allowed, 0)


def unpacked(packed: Tensor) -> Tensor:
    """True where a bit of int32 [rows, words] is 0: bool [rows, words * 32]."""
    bits = torch.arange(32, dtype=torch.int32, device=packed.device)
    return ((packed.unsqueeze(-1) >> bits) & 1 == 0).flatten(1)
