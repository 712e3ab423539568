"""The memory on the device that resident adapters share: rows of stacked low-rank factors, one pair a
module."""

import mmap
import threading
from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.lora import LoraAdapter
from loramux.kernels.gated_lora.gate_slot import Extent


class _Group(NamedTuple):
    """The rows of all modules of one shape: a [modules, rows, in], b [modules, rows, out]."""

    places: dict[str, int]
    a: Tensor
    b: Tensor


class Arena:
    """`rows` rows of A ([rows, in]) and of B transposed ([rows, out]) for every module of the base.

    An adapter of rank r occupies r rows, the same in every module, which need not be neighbours, so that free
    space never fragments. Rows that an adapter does not fill (a module it leaves alone, a smaller rank there)
    are zero. Modules of one shape lie in one tensor, so that an adapter, stored in stacks of the same order,
    is written by a few large copies. Not safe for concurrent allocation; `write` may run in another thread.
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
        self.device = torch.device(device)
        self._groups: dict[tuple[int, int], _Group] = {}
        members: dict[tuple[int, int], list[str]] = {}
        for module in sorted(shapes.modules):
            members.setdefault(shapes.modules[module], []).append(module)
        for (n_out, n_in), modules in members.items():
            self._groups[n_out, n_in] = _Group(
                {module: place for place, module in enumerate(modules)},
                _zeros((len(modules), rows, n_in), dtype, self.device),
                _zeros((len(modules), rows, n_out), dtype, self.device),
            )
        self.a: dict[str, Tensor] = {}
        self.b: dict[str, Tensor] = {}
        for module, shape in shapes.modules.items():
            group = self._groups[shape]
            self.a[module] = group.a[group.places[module]]
            self.b[module] = group.b[group.places[module]]
        self.bytes_per_row = row_bytes(shapes, dtype)
        self._free: list[Extent] = [(0, rows)]
        self._write_lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

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
        """Fill rows with an adapter, its scale folded into B, and zero what it leaves out.

        On a GPU the copies run on a stream of their own, beside the steps that are being computed; this
        returns when they are done, so that whoever is told of the rows may use them at once.
        """
        with self._write_lock:
            if self._stream is None:
                self._write(adapter, extents)
                return
            # Earlier users of these rows may still be queued.
            self._stream.wait_stream(torch.cuda.default_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                self._write(adapter, extents)
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record(self._stream)
            done.synchronize()

    def _write(self, adapter: LoraAdapter, extents: Sequence[Extent]) -> None:
        left = {shape: set(group.places) for shape, group in self._groups.items()}
        for stack in adapter.stacks:
            group = self._groups[stack.shape]
            left[stack.shape].difference_update(stack.modules)
            for rows, places in _runs([group.places[module] for module in stack.modules]):
                _fill(group.a[places], stack.a[rows], (1.0,), extents)
                _fill(group.b[places], stack.bt[rows], stack.scales[rows], extents)
        for shape, modules in left.items():
            group = self._groups[shape]
            for _, places in _runs(sorted(group.places[module] for module in modules)):
                for lo, hi in extents:
                    group.a[places, lo:hi] = 0
                    group.b[places, lo:hi] = 0


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU, memory that the system gives out page by page as it is written: rows that nobody has taken
    yet cost nothing."""
    nbytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or not nbytes:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype).view(shape)


def _runs(places: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Stretches of rows of a stack that are neighbours in the arena too: (rows, places)."""
    start = 0
    for row in range(1, len(places) + 1):
        if row == len(places) or places[row] != places[row - 1] + 1:
            yield slice(start, row), slice(places[start], places[row - 1] + 1)
            start = row


def _fill(target: Tensor, source: Tensor, scales: Sequence[float], extents: Sequence[Extent]) -> None:
    """Spread `source` [modules, rank, n], times one scale or one a module, over rows of `target`
    [modules, rows, n]; rows beyond its rank become zero. It is multiplied in the wider type of the two, so
    that the product is rounded once, to the target's."""
    rank, done = source.shape[1], 0
    for lo, hi in extents:
        filled = max(0, min(rank - done, hi - lo))
        if filled:
            rows, part = target[:, lo : lo + filled], source[:, done : done + filled]
            if all(scale == 1.0 for scale in scales):
                rows.copy_(part, non_blocking=True)
            else:
                wide = torch.promote_types(part.dtype, rows.dtype)
                part = part.to(rows.device, wide, non_blocking=True)
                torch.mul(part, _factor(scales, rows.device), out=rows)
        target[:, lo + filled : hi] = 0
        done += hi - lo


def _factor(scales: Sequence[float], device: torch.device) -> Tensor | float:
    """A number where it is the same everywhere, else a float32 column: either way the product is rounded
    once."""
    if len(set(scales)) == 1:
        return scales[0]
    return torch.tensor(scales, device=device)[:, None, None]


def row_bytes(shapes: BaseShapes, dtype: torch.dtype) -> int:
    """Bytes of one row over all modules of the base."""
    return sum(n_out + n_in for n_out, n_in in shapes.modules.values()) * dtype.itemsize
