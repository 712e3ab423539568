"""The collector rests while a process starts, and looks at what came of it once."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from loramux.server.memory.give_back import starting


class Knot:
    """Holds itself."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


def test_nothing_is_collected_before_the_end_and_the_rest_is_frozen() -> None:
    with starting():
        assert not gc.isenabled()
        kept, knot = Knot(), weakref.ref(Knot())
        for _ in range(3 * gc.get_threshold()[0]):
            kept.me = Knot()
        assert knot() is not None
    assert knot() is None
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    assert not any(one is kept for one in gc.get_objects())


def test_a_start_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ValueError, match="no such pool"), starting():
        raise ValueError("no such pool")
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
