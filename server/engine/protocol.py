"""What the server asks of an engine: work in, events out.

The protocol carries no tensors and no model objects. An adapter is an opaque handle that the residency gave
out and only the engine understands, so that an engine may also be a remote cluster.
"""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]
# Below this a temperature is the limit towards 0: in float32 it would underflow, or its quotients overflow.
LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token of one sequence is chosen.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off. `logprobs` is the number of
    alternatives reported beside each sampled token, 0 for the token alone, `None` for no log-probabilities.
    Log-probabilities are those of the model before any sampling parameter is applied.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence to generate: `prompt` token ids, at least one; `max_tokens` 0 only scores the prompt.

    `prompt_logprobs` asks for the log-probability of each prompt token with that many alternatives.
    `grammar`, in llguidance's form, is what the answer has to follow: its end is the end of the answer.
    `answered` makes it go on after these tokens of its answer, which another engine had chosen: it was taken
    in there, so that no queue is too full for it, and `max_tokens` counts them.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    adapter: object = None
    prompt_logprobs: int | None = None
    grammar: str | None = None
    answered: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token, its natural-log probability (`None` for the first token of a prompt) and the likeliest
    others."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """The engine took the sequence out of its queue; its prefill begins."""

    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PromptScored:
    """One score per prompt token, before the first `Token`; only when `prompt_logprobs` was asked for."""

    scores: tuple[TokenScore, ...]


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. A stop token is reported as the end, never as a `Token`."""

    score: TokenScore


@dataclass(frozen=True, slots=True)
class Finished:
    """Always the last event. `stop_token` is the token that ended the sequence, if one did, and its score.
    `cached_tokens` are as in `Started`, from an engine that tells of them no earlier."""

    reason: FinishReason
    stop_token: int | None = None
    score: TokenScore | None = field(default=None, compare=False)
    cached_tokens: int = 0


Event = Started | PromptScored | Token | Finished


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for `/metrics`; counters only grow. `dead` says why the engine will never step again,
    `stalled` why it does not now.

    `preemptions` counts sequences that gave their cache back to others and were computed again. The cache has
    `kv_pages` pages of `kv_page_tokens` tokens.
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefix_hit_tokens: int = 0
    step_seconds: float = 0.0
    preemptions: int = 0
    kv_pages: int = 0
    kv_page_tokens: int = 0
    dead: str | None = None
    stalled: str | None = None

    @property
    def is_live(self) -> bool:
        """Whether it steps, or would."""
        return self.dead is None and self.stalled is None


class EngineError(RuntimeError):
    """The engine could not finish this sequence; other sequences are not affected unless it is closed."""


class GrammarError(EngineError):
    """A grammar that cannot be compiled, or that became too much for its limits as the answer grew."""


class EngineOverloaded(EngineError):
    """The queue is full: the client should come back in `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: int = 1) -> None:
        super().__init__(f"the queue is full: {waiting} sequences are waiting")
        self.waiting = waiting
        self.retry_after = retry_after


class EngineExhausted(EngineError):
    """A step found no memory; its sequences have ended, and a later one may well find some."""


class EngineClosed(EngineError):
    """The engine is not running (stopped, draining, or dead after a fatal error, which the message names)."""


class Engine(Protocol):
    """Generates sequences, many at a time."""

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together that one sequence may have."""
        ...

    async def start(self) -> None:
        """Begin stepping. Call once."""
        ...

    async def stop(self, timeout: float) -> None:
        """Finish what runs for at most `timeout` seconds, fail the rest with `EngineClosed`, and end."""
        ...

    def run(self, work: Work) -> AsyncGenerator[Event, None]:
        """Events of one sequence, ending with `Finished`.

        An async generator: closing it (`contextlib.aclosing`) aborts the sequence, and returns only when no
        later step will touch the sequence's adapter.

        Raises:
            EngineOverloaded: before the first event, when the queue is full.
            GrammarError: before the first event or later.
            EngineClosed: at any time.
            EngineError: this sequence failed.
        """
        ...

    def stats(self) -> EngineStats:
        """Cheap; called for every scrape."""
        ...
