"""Completions answers."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from loramux.server.events import Delta, ScoredToken
from loramux.server.render.renderer import Renderer, WholeChoice
from loramux.server.text.scores import completion_entry
from loramux.server.wire.completions import completion_choice, completion_logprobs


@dataclass(slots=True)
class CompletionRenderer(Renderer):
    """Log-probabilities say where in the text of their choice each token stands."""

    _offsets: Counter[int] = field(default_factory=Counter, init=False)

    def entry(self, token: ScoredToken) -> dict[str, Any]:
        return completion_entry(self.vocabulary, token)

    def next_choices(self, delta: Delta) -> list[dict[str, Any]]:
        entries = self.entries(delta)
        offset = self._offsets[delta.index]
        self._offsets[delta.index] += _length(delta)
        choice = completion_choice(
            delta.index,
            text=delta.text,
            logprobs=completion_logprobs(entries, offset) if entries else None,
            finish_reason=delta.finish,
        )
        return [choice]

    def whole_choice(self, index: int, choice: WholeChoice) -> dict[str, Any]:
        return completion_choice(
            index,
            text="".join(choice.text),
            logprobs=completion_logprobs(choice.entries, 0) if self.logprobs else None,
            finish_reason=choice.finish,
        )


def _length(delta: Delta) -> int:
    """How far the choice's text has grown, counting what a stop scanner may still hold back."""
    return sum(len(token.text) for token in delta.tokens) if delta.tokens else len(delta.text)
