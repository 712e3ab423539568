"""One replica: a queue, steps whose length depends on the batch, rows for so many experts."""

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from benchmarks.fleet.measured import Steps

INFINITE = math.inf


@dataclass(slots=True)
class Sequence:
    """A request on a replica: what is left of its prompt and of its answer, in tokens."""

    request: int
    prompt: int
    answer: int


@dataclass(slots=True)
class Residents:
    """Experts in their rows, the longest unused first out."""

    room: int
    held: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def take(self, experts: Iterable[int]) -> tuple[list[int], list[int]]:
        """Make experts resident; which were not, and which had to go for them."""
        fresh = []
        for expert in experts:
            if expert not in self.held:
                fresh.append(expert)
                self.held[expert] = None
            self.held.move_to_end(expert)
        gone = [self.held.popitem(last=False)[0] for _ in range(len(self.held) - self.room)]
        return fresh, gone


class Replica:
    """Steps are not simulated one by one: between two changes of the batch all are equally long.

    `wake` is when something changes next; whoever runs the simulation calls `step` then.
    """

    def __init__(self, steps: Steps, room: int) -> None:
        self._steps = steps
        self.residents = Residents(room)
        self.copied_until = 0.0
        self.tokens = 0
        self.wake = INFINITE
        self._waiting: deque[Sequence] = deque()
        self._running: list[tuple[int, int, Sequence]] = []  # by the number of the step that ends them
        self._number = 0  # steps that are done
        self._from = 0.0  # the current stretch of equal steps
        self._each = 0.0
        self._count = 0
        self._is_prompt = False
        self._fresh: list[Sequence] = []

    def put(self, sequence: Sequence, now: float) -> None:
        """A sequence comes; it is taken in at the next step."""
        self._waiting.append(sequence)
        if self.wake == INFINITE:
            self.wake = now
        elif self._count and not self._is_prompt and len(self._running) < self._steps.max_running:
            done = min(self._count, max(1, math.ceil((now - self._from) / self._each - 1e-9)))
            self._count, self.wake = done, self._from + done * self._each

    def step(self) -> tuple[list[Sequence], list[Sequence]]:
        """At `wake`: those whose first token has come, and those that have ended."""
        now = self.wake
        self._number += self._count
        self.tokens += self._count * len(self._running) + len(self._fresh)
        started, ended = self._fresh, []
        for sequence in started:
            heapq.heappush(self._running, (self._number + sequence.answer - 1, sequence.request, sequence))
        while self._running and self._running[0][0] <= self._number:
            ended.append(heapq.heappop(self._running)[2])
        self._begin(now)
        return started, ended

    def _begin(self, now: float) -> None:
        """The next stretch of steps."""
        steps = self._steps
        self._fresh, tokens = [], 0
        while self._waiting and len(self._running) + len(self._fresh) < steps.max_running:
            if self._fresh and tokens + self._waiting[0].prompt > steps.step_tokens:
                break
            self._fresh.append(self._waiting.popleft())
            tokens += self._fresh[-1].prompt
        self._from, self._is_prompt = now, bool(self._fresh)
        if self._fresh:
            decode = steps.decode[len(self._running)]
            self._each, self._count = max(steps.prefill, decode) + steps.prefill_token * tokens, 1
        elif self._running:
            self._each = steps.decode[len(self._running)]
            self._count = self._running[0][0] - self._number
        else:
            self._each, self._count, self.wake = 0.0, 0, INFINITE
            return
        self.wake = now + self._count * self._each

    def lose(self, now: float) -> tuple[list[Sequence], list[Sequence]]:
        """It dies: its sequences as another replica has to take them on; those that had begun to answer,
        whose prompt then has their tokens too, and those that had not."""
        done = self._number
        if not self._is_prompt and self._each:
            done += min(self._count, int((now - self._from) / self._each))
        self.tokens += (done - self._number) * len(self._running)
        begun = [
            Sequence(one.request, one.prompt + one.answer - (last - done), last - done)
            for last, _, one in self._running
            if last > done
        ]
        waiting = [*self._fresh, *self._waiting]
        self._running, self._fresh, self.wake = [], [], INFINITE
        self._waiting.clear()
        return begun, waiting
