"""What a start has used and needs no more, back to the system."""

import ctypes
import gc
import sys


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
