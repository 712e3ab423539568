"""Retry-After of a full queue, against a queue that is played through step by step."""

import random

import pytest

from loramux.server.engine.pace import FIRST_LENGTH, LONGEST, Pace


def played(asked: list[int], slots: int, step_seconds: float) -> float:
    """How long it takes when every free slot takes the next one."""
    waiting, running, seconds = list(asked), list[int](), 0.0
    while waiting or running:
        while waiting and len(running) < slots:
            running.append(waiting.pop() + 1)
        running = [left - 1 for left in running if left > 1]
        seconds += step_seconds
    return seconds


def test_the_first_burst_was_once_told_one_second_by_everybody() -> None:
    pace = Pace(4, step_seconds=0.02)  # of the step that showed that the engine works
    asked = [FIRST_LENGTH] * 100
    assert abs(pace.wait_seconds(asked) - played(asked, 4, 0.02)) <= 1


def test_a_queue_is_told_how_long_it_takes(seed: int) -> None:
    rng = random.Random(seed)
    slots, step = rng.randint(1, 32), rng.uniform(0.005, 0.05)
    pace = Pace(slots, step_seconds=1.0)
    for _ in range(200):
        pace.stepped(step)
        pace.ended(40)
    asked = [40] * rng.randint(slots, 300)
    expected = max(1.0, min(float(LONGEST), played(asked, slots, step)))
    # A last wave that fills no more than a part of the slots takes as long as a whole one.
    assert abs(pace.wait_seconds(asked) - expected) <= 1 + 41 * step


def test_quiet_hours_once_passed_for_slowness() -> None:
    """The time between answers was counted whether there was work or not; now only steps take time."""
    pace = Pace(4, step_seconds=0.02)
    for _ in range(6):
        pace.stepped(0.02)
        pace.ended(2)
    assert pace.wait_seconds([48] * 32) == 1


@pytest.mark.parametrize(("asked", "most"), [([1] * 300, 3), ([100_000] * 300, LONGEST)])
def test_what_was_asked_bounds_it_and_a_minute_does(asked: list[int], most: int) -> None:
    assert 1 <= Pace(4, step_seconds=0.02).wait_seconds(asked) <= most
