"""The memory on the device that resident adapters share: rows of stacked low-rank factors, one pair a
module."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.lora import LoraAdapter
from loramux.kernels.gated_lora.plan import Extent


class Arena:
    """`rows` rows of A ([rows, in]) and of B transposed ([rows, out]) for every module of the base.

    An adapter of rank r occupies r rows, the same in every module, which need not be neighbours, so that free
    space never fragments. Rows that an adapter does not fill (a module it leaves alone, a smaller rank there)
    are zero. Not safe for concurrent allocation; `write` may run in another thread.
    """

    def __init__(
        self,
        shapes: BaseShapes,
        rows: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if rows < 1:
            raise ValueError(f"an arena needs at least one row, got {rows}")
        self.rows = rows
        self.dtype = dtype
        self.a: dict[str, Tensor] = {}
        self.b: dict[str, Tensor] = {}
        for module, (n_out, n_in) in shapes.modules.items():
            self.a[module] = torch.zeros(rows, n_in, dtype=dtype, device=device)
            self.b[module] = torch.zeros(rows, n_out, dtype=dtype, device=device)
        self.bytes_per_row = row_bytes(shapes, dtype)
        self._free: list[Extent] = [(0, rows)]
        self._write_lock = threading.Lock()

    @property
    def free_rows(self) -> int:
        return sum(hi - lo for lo, hi in self._free)

    def allocate(self, rank: int) -> tuple[Extent, ...]:
        """Take `rank` rows, lowest first.

        Raises:
            MemoryError: when fewer are free; nothing is taken then.
        """
        if rank > self.free_rows:
            raise MemoryError(f"the arena has {self.free_rows} free rows, {rank} were asked for")
        taken: list[Extent] = []
        while rank:
            lo, hi = self._free.pop(0)
            cut = min(hi, lo + rank)
            taken.append((lo, cut))
            rank -= cut - lo
            if cut < hi:
                self._free.insert(0, (cut, hi))
        return tuple(taken)

    def free(self, extents: Sequence[Extent]) -> None:
        """Give rows back."""
        free: list[Extent] = []
        for lo, hi in sorted([*self._free, *extents]):
            if free and lo < free[-1][1]:
                raise ValueError(f"rows {lo} to {hi} are free already")
            if free and free[-1][1] == lo:
                free[-1] = (free[-1][0], hi)
            else:
                free.append((lo, hi))
        self._free = free

    @torch.no_grad()
    def write(self, adapter: LoraAdapter, extents: Sequence[Extent]) -> None:
        """Fill rows with an adapter, its scale folded into B, and zero what it leaves out."""
        with self._write_lock:
            for module, a in self.a.items():
                b = self.b[module]
                pair = adapter.pairs.get(module)
                rank = 0 if pair is None else pair.a.shape[0]
                done = 0
                for lo, hi in extents:
                    filled = max(0, min(rank - done, hi - lo))
                    if pair is not None and filled:
                        a[lo : lo + filled] = pair.a[done : done + filled]
                        b[lo : lo + filled] = (pair.b[:, done : done + filled].float() * pair.scale).T
                    a[lo + filled : hi] = 0
                    b[lo + filled : hi] = 0
                    done += hi - lo


def row_bytes(shapes: BaseShapes, dtype: torch.dtype) -> int:
    """Bytes of one row over all modules of the base."""
    return sum(n_out + n_in for n_out, n_in in shapes.modules.values()) * dtype.itemsize
