"""Runs a fleet through some traffic and says what came of it."""

import heapq
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.fleet.measured import Steps
from benchmarks.fleet.placement import Placement
from benchmarks.fleet.replica import INFINITE, Replica, Sequence
from benchmarks.fleet.traffic import Traffic

#: Until a replica's loss is noticed and its requests go on elsewhere.
NOTICE = 0.1
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Fleet:
    """`room`: experts that are resident at once at each of the replicas."""

    replicas: int
    room: int
    steps: Steps


@dataclass(frozen=True, slots=True)
class Loss:
    """A replica dies at `at`, and nobody starts it again."""

    at: float
    replica: int = 0


@dataclass(slots=True, eq=False)
class Outcome:
    """What happened to each request [n]; NaN where nothing had when the simulation ended.

    Attributes:
        first: seconds from its arrival to its first token.
        copied: experts that had to be copied in for it.
        tokens: answer tokens by replica.
        moved: of requests that a lost replica had begun to answer, the seconds without a token.
    """

    at: Numbers
    first: Numbers
    copied: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    moved: dict[int, float] = field(default_factory=dict)
    restarted: int = 0


class Simulation:
    """Events in the order of their time; of equal times the one that was planned first."""

    def __init__(
        self, fleet: Fleet, traffic: Traffic, placement: Placement, loss: Loss | None = None
    ) -> None:
        self._fleet, self._traffic, self._placement, self._loss = fleet, traffic, placement, loss
        self._replicas = [Replica(fleet.steps, fleet.room) for _ in range(fleet.replicas)]
        self._alive = np.arange(fleet.replicas)
        self._loads = np.zeros(fleet.replicas, np.int64)
        experts = int(traffic.experts.max()) + 1
        self._resident = np.zeros((experts, fleet.replicas), np.int8)
        self._none = np.zeros(fleet.replicas, np.int64)
        self._events: list[tuple[float, int, int, Sequence | None]] = []
        self._planned = 0
        self._copying: list[dict[int, Sequence]] = [{} for _ in range(fleet.replicas)]
        self._lost_at: dict[int, float] = {}
        count = len(traffic)
        self._outcome = Outcome(
            traffic.at, np.full(count, np.nan), np.zeros(count, np.int64), np.zeros(fleet.replicas, np.int64)
        )

    def run(self) -> Outcome:
        """All arrivals, and what is running after the last one until it is done."""
        at = self._traffic.at
        coming, count = 0, len(at)
        loss = self._loss
        while True:
            next_event = self._events[0][0] if self._events else INFINITE
            arrival = float(at[coming]) if coming < count else INFINITE
            if loss is not None and loss.at <= min(next_event, arrival):
                self._lose(loss)
                loss = None
            elif arrival <= next_event and coming < count:
                prompt, answer = int(self._traffic.prompt[coming]), int(self._traffic.answer[coming])
                self._place(Sequence(coming, prompt, answer), arrival)
                coming += 1
            elif self._events:
                time, _, number, sequence = heapq.heappop(self._events)
                if sequence is None:
                    self._step(number, time)
                elif number >= 0:
                    self._ready(number, sequence, time)
                else:  # what a lost replica had
                    self._place(sequence, time)
            else:
                break
        for number, replica in enumerate(self._replicas):
            self._outcome.tokens[number] = replica.tokens
        return self._outcome

    def _plan(self, time: float, number: int, sequence: Sequence | None = None) -> None:
        self._planned += 1
        heapq.heappush(self._events, (time, self._planned, number, sequence))

    def _place(self, sequence: Sequence, now: float) -> None:
        """Choose a replica, and begin to copy in what it lacks: one expert after another."""
        request = sequence.request
        experts = self._traffic.experts[request]
        missing = self._none
        if self._placement.reads_residents:
            missing = len(experts) - self._resident[experts].sum(axis=0, dtype=np.int64)
        blend, session = int(self._traffic.blend[request]), int(self._traffic.session[request])
        alive = self._alive
        number = self._placement.choose(alive, self._loads[alive], missing[alive], blend, session)
        replica = self._replicas[number]
        self._loads[number] += 1
        fresh, gone = replica.residents.take(experts.tolist())
        self._resident[fresh, number] = 1
        self._resident[gone, number] = 0
        self._outcome.copied[request] += len(fresh)
        steps = self._fleet.steps
        # Also what is resident may be on its way still: copies are in order.
        begun = max(now, replica.copied_until) if fresh else now
        ready = begun + len(fresh) * steps.expert_bytes / steps.copy_rate
        if fresh:
            replica.copied_until = ready
            self._copying[number][request] = sequence
            self._plan(ready, number, sequence)
        else:
            self._ready(number, sequence, now)

    def _ready(self, number: int, sequence: Sequence, now: float) -> None:
        if now >= self._lost_at.get(number, INFINITE):
            return  # its loss has placed it anew
        self._copying[number].pop(sequence.request, None)
        replica = self._replicas[number]
        before = replica.wake
        replica.put(sequence, now)
        if replica.wake != before:
            self._plan(replica.wake, number)

    def _step(self, number: int, now: float) -> None:
        replica = self._replicas[number]
        if now != replica.wake:
            return  # planned before something changed
        started, ended = replica.step()
        for sequence in started:
            request = sequence.request
            if np.isnan(self._outcome.first[request]):
                self._outcome.first[request] = now - self._traffic.at[request]
            if request in self._outcome.moved and self._outcome.moved[request] < 0:
                self._outcome.moved[request] += now
        self._loads[number] -= len(ended)
        if replica.wake != INFINITE:
            self._plan(replica.wake, number)

    def _lose(self, loss: Loss) -> None:
        number, now = loss.replica, loss.at
        self._lost_at[number] = now
        self._alive = self._alive[self._alive != number]
        begun, waiting = self._replicas[number].lose(now)
        waiting += self._copying[number].values()
        for sequence in begun:
            self._outcome.moved[sequence.request] = -now
        self._outcome.restarted = len(waiting)
        self._resident[:, number] = 0
        for sequence in [*begun, *waiting]:
            self._plan(now + NOTICE, -1, sequence)


def percentiles(values: Numbers) -> dict[str, float]:
    """In milliseconds."""
    found = values[~np.isnan(values)]
    if not len(found):
        return {}
    marks = np.percentile(found, [50, 95, 99, 99.9]) * 1e3
    return {
        f"p{mark:g}_ms": round(float(value), 2) for mark, value in zip((50, 95, 99, 99.9), marks, strict=True)
    }


def summary(outcome: Outcome, fleet: Fleet, since: float, parts: int) -> dict[str, Any]:
    """Of the requests that arrived after the fleet had warmed up."""
    late = outcome.at >= since
    seconds = float(outcome.at[-1] - since)
    copied = outcome.copied[late]
    moved_bytes = float(copied.sum()) * fleet.steps.expert_bytes
    alive = outcome.tokens[outcome.tokens > 0]
    return {
        "requests": int(late.sum()),
        "unanswered": int(np.isnan(outcome.first).sum()),
        "experts_resident": round(1 - float(copied.sum()) / (parts * len(copied)), 4),
        "requests_without_a_copy": round(float((copied == 0).mean()), 4),
        "first_token": percentiles(outcome.first[late]),
        "busiest_over_mean": round(float(alive.max() / alive.mean()), 3),
        "copied_gib_per_second": round(moved_bytes / seconds / 2**30, 3),
    }


def second_by_second(outcome: Outcome, at: float, seconds: int, parts: int) -> list[dict[str, Any]]:
    """Around a loss at `at`: from two seconds before it to `seconds` after."""
    rows = []
    for second in range(-2, seconds):
        chosen = (outcome.at >= at + second) & (outcome.at < at + second + 1)
        share = 1 - float(outcome.copied[chosen].sum()) / (parts * max(1, int(chosen.sum())))
        rows.append(
            {"second": second, "experts_resident": round(share, 4), **percentiles(outcome.first[chosen])}
        )
    return rows


def pauses(outcome: Outcome) -> dict[str, Any]:
    """Of the requests that a lost replica had begun to answer."""
    values: Items[float] = [value for value in outcome.moved.values() if value >= 0]
    return {
        "streams_moved": len(outcome.moved),
        "requests_begun_anew": outcome.restarted,
        "never_went_on": sum(value < 0 for value in outcome.moved.values()),
        **percentiles(np.array(values, np.float64)),
        "longest_ms": round(max(values, default=0.0) * 1e3, 1),
    }
