"""Teams of OpenMP: there while they are used, and gone when they are let go."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from loramux.kernels.team import release_team, releasing
from tests.teams import settled, threads, work

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="threads are counted as Linux lists them"),
    pytest.mark.skipif(torch.get_num_threads() < 2, reason="one processor has no teams"),
]


@pytest.mark.parametrize("finish", [releasing(work), lambda: (work(), release_team())])
def test_a_team_is_let_go(finish: Callable[[], object]) -> None:
    with ThreadPoolExecutor(1) as executor:
        executor.submit(release_team).result()
        alone = threads()
        executor.submit(work).result()
        assert threads() == alone + torch.get_num_threads() - 1
        executor.submit(finish).result()
        assert settled(alone)


def test_what_fails_lets_its_team_go_too() -> None:
    def fail() -> None:
        work()
        raise ValueError("no")

    with ThreadPoolExecutor(1) as executor:
        executor.submit(release_team).result()
        alone = threads()
        with pytest.raises(ValueError, match="no"):
            executor.submit(releasing(fail)).result()
        assert settled(alone)
