"""Counting the threads of this process, as Linux lists them."""

import os
import threading

import torch


def work() -> None:
    """Enough for a parallel region."""
    torch.ones(2**20).mul_(2.0)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def settled(count: int) -> bool:
    """A thread that has ended is listed until the system has seen it."""
    until = threading.Event()
    for _ in range(500):
        if threads() == count:
            return True
        until.wait(0.01)
    return False
