"""What a step asks of its owner."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from loramux.server.engine.protocol import TokenScore

Segment = tuple[str, int]


class StepHooks(Protocol):
    """Called on the stepping thread."""

    def salt(self, request_id: str) -> str | None:
        """What tells this request's KV cache apart from others with the same tokens; `None` for nothing."""
        ...

    def may_share(self, request_id: str) -> bool:
        """Whether the request may start from another one's KV cache."""
        ...

    def before_forward(self, segments: Sequence[Segment], positions: Sequence[int]) -> None:
        """(request id, tokens) of the packed batch in order, and the position at which each one starts."""
        ...

    def after_forward(self) -> None:
        """The forward pass is over, also when it failed."""
        ...

    def scored_prompt(self, request_id: str) -> tuple[tuple[int, ...], int] | None:
        """The prompt and the number of alternatives, for a request whose prompt is still to be scored."""
        ...

    def add_prompt_scores(self, request_id: str, scores: list[TokenScore]) -> None:
        """Scores of the next prompt tokens, in order."""
        ...

    def sample(self, request_ids: Sequence[str], logits: Tensor) -> list[int]:
        """Choose a token for each request; `logits` is float32 [requests, vocabulary]."""
        ...

    def stepped(self, prefill_tokens: int, decode_tokens: int) -> None:
        """The tokens chosen in this step are final."""
        ...

    def failed(self, request_id: str, error: str) -> None:
        """The request ended with an error; no later step will include it."""
        ...

    def cancelled(self, request_ids: set[str]) -> None:
        """No later step will include these requests."""
        ...
