"""Random inputs are fresh in every run, and a failure says which seed made them."""

import os
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch

IN_CI = bool(os.environ.get("CI"))


def pytest_sessionstart() -> None:
    """Fixtures of a module are made before the seed of its first test."""
    if IN_CI:
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> Iterator[int]:
    """Seed torch and NumPy freshly, or from `TEST_SEED`.

    In continuous integration the seed is the test's own in every run, as Hypothesis does it: there a failure
    should be about the change.
    """
    given = os.environ.get("TEST_SEED")
    if given is not None:
        chosen = int(given)
    elif IN_CI:
        chosen = zlib.crc32(request.node.nodeid.encode())
    else:
        chosen = int.from_bytes(os.urandom(4), "big")
    torch.manual_seed(chosen)
    np.random.seed(chosen)
    yield chosen
    request.node.add_report_section("call", "seed", f"TEST_SEED={chosen}")
