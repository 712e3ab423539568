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
    """A few threads with one intra-op thread each that on Linux run only where nothing else wants to.

    A torch operation on the default executor would open a team of threads as large as the machine and push
    the decoding team off its cores. A lower priority is not enough: a step waits for the last thread of its
    team, and the scheduler lets a thread of any ordinary priority finish its slice first. An idle one
    (`SCHED_IDLE`) gives way at once. Decoding leaves it the gaps between its parallel regions.

    Args:
        name: shown by tools that list threads.
        count: how many calls run at once; more wait.
    """

    def __init__(self, name: str, *, count: int = 1) -> None:
        self._executor = ThreadPoolExecutor(count, thread_name_prefix=name, initializer=_settle)

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function there and wait for what it returns or raises."""
        # Taken out by the thread: one that runs only in gaps may come to forget its last call much later, and
        # would keep what it was given until then.
        calls = [partial(function, *args, **kwargs)]

        def call() -> R:
            return calls.pop()()

        return await asyncio.get_running_loop().run_in_executor(self._executor, call)


def _settle() -> None:
    # The number is kept per thread, but the last one set is also what new threads begin with: a short-lived
    # thread puts that back.
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    restorer = threading.Thread(target=torch.set_num_threads, args=(usual,))
    restorer.start()
    restorer.join()
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # 0 is the calling thread
