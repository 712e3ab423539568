"""One request's life as states with time stamps; every latency metric is a difference of two stamps."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum


class State(StrEnum):
    """Where a request is."""

    RECEIVED = "received"
    ROUTED = "routed"
    MERGING = "merging"
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"
    FAILED = "failed"
    ABORTED = "aborted"


ENDS = frozenset({State.FINISHED, State.FAILED, State.ABORTED})

_NEXT: dict[State, frozenset[State]] = {
    State.RECEIVED: frozenset({State.ROUTED}),
    State.ROUTED: frozenset({State.MERGING}),
    State.MERGING: frozenset({State.WAITING}),
    State.WAITING: frozenset({State.PREFILL}),
    # A prompt that is only scored, or whose first token is a stop, finishes without decoding.
    State.PREFILL: frozenset({State.DECODE, State.FINISHED}),
    State.DECODE: frozenset({State.FINISHED}),
}


class IllegalTransition(RuntimeError):
    """A bug of ours: the job cannot go from one state to the other."""


@dataclass(slots=True)
class Job:
    """`stamps` hold the monotonic time of each state's beginning; a state is entered once.

    A job may run several sequences (`n`, several prompts): it is in prefill when the first of them is, and in
    decode from the first token of any.
    """

    id: str
    model: str
    clock: Callable[[], float] = time.monotonic
    state: State = State.RECEIVED
    stamps: dict[State, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    experts: tuple[str, ...] = ()
    finish_reasons: list[str] = field(default_factory=list)
    last_token: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stamps[self.state] = self.clock()

    def to(self, state: State) -> None:
        """Enter `state`.

        Raises:
            IllegalTransition: the job has ended, or this is not its next state; any may fail or be aborted.
        """
        legal = self.state not in ENDS and (
            state in (State.FAILED, State.ABORTED) or state in _NEXT.get(self.state, frozenset())
        )
        if not legal:
            raise IllegalTransition(f"job {self.id}: {self.state} cannot become {state}")
        self.state = state
        self.stamps[state] = self.clock()

    def started(self) -> None:
        """A sequence left the engine's queue."""
        if self.state is State.WAITING:
            self.to(State.PREFILL)

    def token(self, sequence: int) -> float | None:
        """A token of a sequence came; seconds since the one before it, `None` for its first."""
        self.started()
        if self.state is State.PREFILL:
            self.to(State.DECODE)
        self.completion_tokens += 1
        now = self.clock()
        before = self.last_token.get(sequence)
        self.last_token[sequence] = now
        return None if before is None else now - before

    def seconds(self, start: State, end: State) -> float | None:
        """Time from the beginning of one state to that of another, `None` if either never came."""
        if start in self.stamps and end in self.stamps:
            return self.stamps[end] - self.stamps[start]
        return None

    @property
    def ended(self) -> bool:
        """Whether the job is finished, failed or aborted."""
        return self.state in ENDS
