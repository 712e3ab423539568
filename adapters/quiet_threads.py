"""Threads for heavy work beside decoding: they must not take its cores."""

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class QuietThreads:
    """A few threads with one intra-op thread each, and on Linux with a lower priority where asked.

    A torch operation on the default executor would open a team of threads as large as the machine and push
    the decoding team off its cores.

    Args:
        name: shown by tools that list threads.
        count: how many calls run at once; more wait.
        nice: added to the priority value, 0 to 19. At 10, what is runnable at 0 gets nine times as much of a
            contended core; an idle core is used in full.
    """

    def __init__(self, name: str, *, count: int = 1, nice: int = 0) -> None:
        self._executor = ThreadPoolExecutor(
            count, thread_name_prefix=name, initializer=_settle, initargs=(nice,)
        )

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function there and wait for what it returns or raises."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, partial(function, *args, **kwargs))


def _settle(nice: int) -> None:
    # The number is kept per thread, but the last one set is also what new threads begin with: a short-lived
    # thread puts that back.
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    restorer = threading.Thread(target=torch.set_num_threads, args=(usual,))
    restorer.start()
    restorer.join()
    if nice and sys.platform == "linux":
        # On Linux, threads have a priority of their own.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
