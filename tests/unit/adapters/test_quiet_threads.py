"""Heavy work beside decoding has one core's worth of threads and takes nobody else's."""

import asyncio
import os
import sys
import threading

import pytest
import torch

from loramux.adapters.quiet_threads import QuietThreads


def test_a_quiet_thread_computes_on_one_core_and_leaves_others_as_they_were() -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    try:

        async def scenario() -> None:
            quiet = QuietThreads("test-quiet")
            assert await quiet.run(torch.get_num_threads) == 1
            assert await asyncio.to_thread(torch.get_num_threads) == 2
            assert torch.get_num_threads() == 2
            assert await quiet.run(torch.get_num_threads) == 1

        asyncio.run(scenario())
    finally:
        torch.set_num_threads(usual)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a policy of their own on Linux")
def test_a_quiet_thread_yields_contended_cores() -> None:
    async def scenario() -> None:
        here = os.sched_getscheduler(0)
        quiet = QuietThreads("test-quiet")
        assert await quiet.run(os.sched_getscheduler, 0) == os.SCHED_IDLE
        assert os.sched_getscheduler(0) == here

    asyncio.run(scenario())


def test_errors_come_back_and_calls_share_the_threads() -> None:
    async def scenario() -> None:
        quiet = QuietThreads("test-quiet", count=2)
        with pytest.raises(ZeroDivisionError):
            await quiet.run(lambda: 1 / 0)
        names = await asyncio.gather(*(quiet.run(lambda: threading.current_thread().name) for _ in range(8)))
        assert len(set(names)) <= 2
        assert all(name.startswith("test-quiet") for name in names)

    asyncio.run(scenario())
