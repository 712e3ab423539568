"""Memory for the results of merges. Fresh 4 KiB pages cost several times the merge that fills them.

A large result on the CPU lies in an anonymous mapping of huge pages (512 times fewer faults), and a mapping
whose tensor is gone is handed out again. Measured in docs/log.md.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque
from threading import Lock

import torch
from torch import Tensor

_PAGE = 2 * 2**20
_KEPT_BYTES = 256 * 2**20

_returned: deque[mmap.mmap] = deque()
_spare: list[mmap.mmap] = []
_lock = Lock()


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if device.type != "cpu" or size < _PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    region = _take(-(-size // _PAGE) * _PAGE)
    view = memoryview(region)
    # Tensors hold the view and nothing else does: it ends with the last of them. The callback may run inside
    # any allocation, also one made while the lock is held, so it may only append.
    weakref.finalize(view, _returned.append, region).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=count).view(shape)


def _take(size: int) -> mmap.mmap:
    """A spare region of exactly this size, else a new one; the oldest spares beyond the limit are let go."""
    with _lock:
        while _returned:
            _spare.append(_returned.popleft())
        found = next((region for region in _spare if len(region) == size), None)
        if found is not None:
            _spare.remove(found)
        while sum(map(len, _spare)) > _KEPT_BYTES:
            _spare.pop(0)
    if found is not None:
        return found
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    region.madvise(mmap.MADV_HUGEPAGE)
    return region
