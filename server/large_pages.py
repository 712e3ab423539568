"""Large pages of memory for weights and caches."""

import os


def ask_for_large_pages() -> None:
    """Have torch ask Linux for pages of 2 MiB, where the system leaves that to programs (`madvise`).

    A decode step reads every weight once. With pages of 4 KiB the processor looks up half a million addresses
    for that, which costs a tenth of the step (docs/log.md). Call it before torch is imported; an operator's
    own setting of the variable stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
