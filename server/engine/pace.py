"""How long a queue will take, from how long steps and answers have been of late."""

from collections.abc import Iterable

# Of an answer, before any has ended: chats may ask for all that the context leaves, and few use it.
FIRST_LENGTH = 64
SHORTEST, LONGEST = 1, 60
RECENT = 16


class Pace:
    """Moving averages of steps and answers.

    A step takes time only while there is work, so that quiet hours do not pass for slowness. The stepping
    thread writes steps, the event loop answers: plain numbers, and one that is a step old does no harm.
    """

    def __init__(self, slots: int, step_seconds: float = 0.0) -> None:
        """`step_seconds` is a first guess: in the first burst everybody comes before anything has ended."""
        self._slots = slots
        self._step_seconds = step_seconds
        self._length: float | None = None

    def stepped(self, seconds: float) -> None:
        """A step has ended."""
        self._step_seconds += (seconds - self._step_seconds) / RECENT

    def ended(self, tokens: int) -> None:
        """An answer has ended, with so many tokens."""
        self._length = tokens if self._length is None else self._length + (tokens - self._length) / RECENT

    def wait_seconds(self, asked: Iterable[int]) -> int:
        """For a queue of sequences that may have so many tokens each; 1 to 60."""
        length = FIRST_LENGTH if self._length is None else self._length
        # One step more for each: its prompt.
        steps = sum(min(most, length) + 1 for most in asked) / self._slots
        return max(SHORTEST, min(LONGEST, round(steps * self._step_seconds)))
