"""OpenMP's threads that wait for a thread's next parallel region: who is done with such work lets them go.

libgomp keeps a team for every thread that has had a parallel region. As soon as all teams together have more
threads than there are processors, none of them waits for its next region by spinning any more: each sleeps
and is woken, which takes longer than many a product of a decode step (docs/log.md). So only the thread that
steps keeps its team.
"""

import ctypes
import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_SOFT = 1  # omp_pause_soft


def release_team() -> None:
    """Let the calling thread's team go; its next parallel region makes another one, in some 50 µs. Does
    nothing inside a parallel region, or where GNU's library of OpenMP is not to be found."""
    for pause in _pauses():
        pause(_SOFT)


def releasing(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose thread lets its team go afterwards."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        finally:
            release_team()

    return call


@cache
def _pauses() -> list[Callable[[int], int]]:
    """Of every copy of the library: torch brings one, which is not always the one that our kernels found."""
    if not sys.platform.startswith("linux"):
        return []
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if "libgomp" in line}
    libraries = [ctypes.CDLL(path) for path in sorted(paths)]
    found = [getattr(library, "omp_pause_resource_all", None) for library in libraries]
    return [pause for pause in found if pause is not None]
