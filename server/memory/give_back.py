"""The memory of a start: what it needs no more goes back to the system."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def starting() -> Iterator[None]:
    """Everything that a process imports and loads before it serves.

    Python's collector rests meanwhile: a start makes half a million objects that nearly all stay, and going
    through them again and again takes a fifth of its time. What only cycles hold goes at the end.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    give_back()


def give_back() -> None:
    """Drop what only cycles hold, and return what the allocator of the C library keeps for later.

    What is left after a start lives as long as the process: the collector need not look at it again.
    """
    gc.collect()
    gc.freeze()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
