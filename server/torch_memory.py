"""What torch is told about memory before it is imported."""

import os

_WISHES = {
    # Pages of 2 MiB, where Linux leaves that to programs (`madvise`). A decode step reads every weight once;
    # with pages of 4 KiB the processor looks up half a million addresses for that, a tenth of the step.
    "THP_MEM_ALLOC_ENABLE": "1",
    # oneDNN compiles a product anew for every number of tokens and keeps 1,024 of them, torch as many again:
    # prompts of many lengths would take 600 MB. A chunk of a prompt has less than ten (docs/log.md).
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}


def arrange_memory() -> None:
    """Set the variables that torch and oneDNN read when they are loaded; an operator's own stay."""
    for name, value in _WISHES.items():
        os.environ.setdefault(name, value)
